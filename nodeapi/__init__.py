"""The API between router and nodes: its messages, its frames and its client over HTTP.

Owns what crosses that wire and its bounds. Knows no engine and no routing; imports kvcore only, and `grammars` numpy
and llguidance.
"""
