"""What callers of a metadata server owe themselves: how long they wait for it, and when they leave it alone.

Owns no call: `metadata_server.client` makes them.
"""
