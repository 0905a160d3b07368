"""vLLM as the engine: a KV connector inside vLLM, and vLLM behind our Engine protocol.

Owns when KV is loaded and saved, and vLLM's life. Scheduling, blocks and sampling are vLLM's; bytes move by `kvstore`.
vllm is imported in `connector.connector`, `queue_naps`, `engine`, `offline` and `start` only; the rest is
tested without it.
"""
