"""How chunks are made smaller on their way to a slower tier, or unreadable, and a tier over another that does it.

Owns the frame of an encoded chunk (docs/wire-formats.md) and each codec, pure. What is decoded is verified by its
reader as any chunk is: a codec decides nothing about correctness.
"""
