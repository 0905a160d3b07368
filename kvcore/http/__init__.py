"""A lean HTTP/1.1 client for calls between the processes of a cluster: kept connections, deadlines, bounds, proofs.

Owns connections and what is on the wire. Knows nothing of what is asked; every failure is one of `errors`.
"""
