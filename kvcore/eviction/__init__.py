"""Which chunk goes first where room is needed: policies by name, and what no policy may break.

Pure; segments and the disk's slab use the same. Imports types only. Policies count entries, not bytes: the
chunks of one model are of one size, but for a prompt's rest.
"""
