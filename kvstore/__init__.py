"""The distributed store as its users see it: chunk format, placement, verification, put, match, wait, get.

Owns the chunk header and the manifest scan. Bytes move by `transfer`, places come from `metadata_server.client`.
`wiring` makes a store from `settings`.
"""
