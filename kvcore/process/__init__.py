"""What a process of ours is made of: its command line, its life, its children, its HTTP server.

Owns signals, start and stop. Knows nothing of what the process serves.
"""
