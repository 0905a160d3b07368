"""`kvferry nodes`: what the nodes of a running cluster do, and orders about them, by way of its router.

Owns what people type and see. What is done is `router.admin`'s.
"""
