"""What every node is: owner of a segment, supervisor of an engine, holder of a lease, control API, drain.

Prefiller, decoder and store-only nodes are this with a role. Owns no routing and no model code.
"""
