"""Several metadata servers that share one index: who is of the set, and how they look like one to their callers.

Owns the record of the set, and the splitting and merging of calls. Which key is whose is `kvcore.partitions`'.
"""
