"""The UCX transport over libucp: one-sided put and get, RDMA where there are HCAs.

Owns contexts, workers, endpoints. Never shared memory (docs/adr/0008).
"""
