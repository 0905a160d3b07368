"""Memory: segments and their mapping, the pages they are made of, how much there is, copies within it.

Owns memfds and their sizes. Knows no peer and no protocol.
"""
