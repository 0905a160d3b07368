"""The TCP transport: its frames, its client, its server.

Owns sockets and their deadlines. docs/wire-formats.md has the protocol.
"""
