"""Moves bytes into and out of segments: shared memory, TCP, in-process (and UCX and NIXL, in their own modules).

Owns registered memory, connections, deadlines and bounds. Knows nothing of chunks, models or metadata.
"""
