"""A node of an index that several metadata servers share: a lease at each, and what each is told of the segment.

Owns no lease by itself: one at one server is `kvnode.membership`'s.
"""
