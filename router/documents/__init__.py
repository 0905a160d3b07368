"""Documents in a client's prompt: how they are named, where they stand in its tokens, and who may reuse them.

Owns the way from named texts to spans of tokens. What is done with these is the engines'; where they lie, routing's.
"""
