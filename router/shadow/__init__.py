"""What reuse costs: a share of requests is also computed in full, on idle nodes, and compared with what was reused.

Owns the gate of documents and what is done with chunks that are wrong. No client waits for any of it; no answer is
changed. Watches ended requests, as `router.cache` does.
"""
