"""The serving loop that the torch engine and the simulated engine share: blocks, scheduler, steps, store jobs.

Owns continuous batching, chunked prefill, prefix reuse and preemption over a `ModelRunner`. Imports no torch.
"""
