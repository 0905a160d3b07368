"""What lies where: the table of replicas, the segments that they lie in, where the next one goes, which one goes first.

Pure, and without time but for calls. The index above it knows nodes, leases and pins.
"""
