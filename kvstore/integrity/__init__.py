"""How a chunk's bytes are proved right: a checksum against damage, a MAC under a key of its tenant against forgery.

Owns what a MAC is over and which key it is under (docs/wire-formats.md, "The MAC of a chunk"). Where secrets come from
is `kvcore.trust`'s matter.
"""
