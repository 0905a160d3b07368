"""The embedded engine: transformers' own model code over paged KV, one forward over a ragged batch a step.

Owns loading, attention over blocks, sampling and the KV's provenance. Scheduling and the store are `engines.paged`'s.
"""
