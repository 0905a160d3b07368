"""What operators do with nodes: look at them, drain, undrain and remove them.

Owns the router's `/v1/nodes` calls. Keeps no order itself: the metadata server does, and every router follows it.
"""
