"""The engine without a model: a timing model, and real KV bytes whose next token depends on every byte read.

Owns arithmetic on tokens and bytes only; scheduling, blocks and the store are `engines.paged`.
"""
