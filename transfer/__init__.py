"""Moves bytes into and out of segments: shared memory, TCP, in-process (and UCX, in its own module).

Owns registered memory, connections, deadlines and bounds. Knows nothing of chunks, models or metadata.
"""
