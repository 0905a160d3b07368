"""Where a request goes: the copy of the index and the policies over it. Pure.

Owns the cost of each way. Knows no clock, no socket and no request's life.
"""
