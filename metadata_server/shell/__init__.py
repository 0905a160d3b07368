"""The HTTP shell of a metadata server: routes, body formats, error bodies, streams, its OpenAPI document, metrics.

Decides nothing about the index: `metadata_server.core` answers. Keeps event streams, and what was encoded for them.
"""
