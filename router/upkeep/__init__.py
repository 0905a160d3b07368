"""What operators do with the cache: look prompts up, warm them, give chunks an end, list and clear generations.

Owns the router's `/v1/cache` calls but for the hit rate. Moves no byte and keeps no state: segments are the metadata
server's, tiers the nodes'.
"""
