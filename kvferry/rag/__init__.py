"""`kvferry rag`: questions over a folder of texts, to see and feel what the reuse of documents brings.

Owns the passages, how they are found, and what a person sees. How documents are reused is the nodes' and the router's.
"""
