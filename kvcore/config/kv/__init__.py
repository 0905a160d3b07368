"""The `kv` of a cluster file.

Owns its keys and their bounds.
"""
