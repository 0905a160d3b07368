"""The life of a request: a pure ledger, what carries its actions out, and the record of what became of it.

Owns retries and legs. Knows tokens, no text and no HTTP.
"""
