"""A router that is several processes on one port: what any of them answers for all of them, and how one leaves.

Owns what the processes ask each other. Each is a whole router by itself: one that is away is left out, and named.
"""
