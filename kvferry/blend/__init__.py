"""`kvferry blend`: what the reuse of documents costs, on a user's own and in a running cluster, and orders about it.

Owns what people type and see. What is done in a cluster is `router.shadow`'s.
"""
