"""What a model wrote, told apart as it comes: its reasoning, its calls of tools, and the rest.

Owns the dialects of model families. Pure: text in pieces of any length in, events out; no token, no HTTP.
"""
