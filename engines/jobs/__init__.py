"""What engines move to and from the store beside their steps: one job loads a prefix, one saves chunks.

Owns the order of reserve, write, commit and release. The paged loop and vLLM's worker halves share it.
"""
