"""`kvferry janitor`: what a running cluster keeps for nodes and clients that are gone, said and removed.

Owns what people type and see. What is done is `router.admin`'s.
"""
