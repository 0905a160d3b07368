"""How tokens flow through a request: from what its decode legs read to what its client's answer takes.

Owns what is unread. Wakes no task for a token that somebody takes at once. Decides nothing.
"""
