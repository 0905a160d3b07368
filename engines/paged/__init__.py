"""The serving loop that the torch engine and the simulated engine share: blocks, scheduler, connector, loop.

Owns continuous batching, chunked prefill, prefix reuse and preemption over a `ModelRunner`. Imports no torch.
"""
