"""`kvferry.LLM`: vLLM in the caller's process, over a store of its own or a running cluster's.

Owns the store's processes and their end. The engine is `engines.vllm.offline`.
"""
