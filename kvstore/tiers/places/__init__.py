"""Where the servers of a Redis tier are: one that is named, a master that sentinels know, or the masters of a cluster.

Owns what a URL says, who has which slot, and whom each chunk belongs to. The bytes are `kvstore.tiers.redis`'.
"""
