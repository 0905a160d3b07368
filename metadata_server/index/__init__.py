"""What the metadata server knows, without I/O: nodes, segments, replicas, leases, events.

Pure state machines: requests and `now` in, replies and events out. Soft state: the nodes can tell it again.
"""
