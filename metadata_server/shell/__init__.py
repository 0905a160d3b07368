"""The HTTP shell of a metadata server: routes, body formats, error bodies, streams, its OpenAPI document, metrics.

Decides nothing about the index and keeps nothing: `metadata_server.core` answers.
"""
