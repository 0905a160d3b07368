"""Chunks between this node's segment and its tiers: filled behind the commit, promoted on demand, warmed up at start.

Owns what moves and when. A tier's own ways are `kvstore.tiers`'; engines know nothing of either.
"""
