"""Mooncake's store as a tier that nodes and clusters share.

Owns the client's process, the buffer that it maps too, and what Mooncake's codes mean. Nobody else speaks to Mooncake.
"""
