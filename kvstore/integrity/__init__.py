"""How a chunk's bytes are proved right: a checksum against damage, a MAC under a key of its tenant against forgery; and
how they are encrypted, so that engines alone read them.

Owns what a MAC is over, which key it or a cipher is under (docs/wire-formats.md, "The MAC of a chunk" and what comes
next), and the memory in which a store encrypts. Where secrets come from is `kvcore.trust`'s matter.
"""
