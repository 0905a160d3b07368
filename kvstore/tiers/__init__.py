"""Where chunks lie beyond the nodes' segments: places that are slower, larger, or outlive a node.

Owns what a tier is and each kind of tier. Engines never see one: the node service moves chunks between a tier and its
segment. Decides nothing about correctness: what a tier gives back is verified as any chunk is.
"""
