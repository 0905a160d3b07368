"""`kvferry cache`: what the cache of a running cluster has and did, and orders about it, by way of its router.

Owns what people type and see. What is done is `router.upkeep`'s.
"""
