"""Engines turn tokens into KV and KV into tokens: embedded torch, simulated, vLLM.

Owns scheduling, blocks, sampling and the connectors to the store. Knows tokens, never text, and no routing.
Import what you need from `engines.base`; this package imports nothing itself.
"""
