"""Knows which chunk lies where: nodes with leases, segments with allocators, objects, replicas, read leases.

Owns the index, allocation and eviction, and the records of what must survive it. Never touches KV bytes. Outsiders
import `client`, `connect` and the modules of messages only (the doctor also `records.look`). A new call begins in
`endpoints`.
"""
