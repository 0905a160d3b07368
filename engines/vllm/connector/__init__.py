"""The KV connector that runs inside vLLM: a scheduler half, a worker half, and what they say to each other.

Owns when KV is loaded and saved, and where its bytes lie in vLLM's tensors. Starting vLLM is `engines.vllm`'s.
"""
