"""vLLM's `POST /inference/v1/generate`: tokens in, tokens out, and sampling parameters by the names of vLLM's own.

Owns its body and the form of its answers; what is answered is a completion's.
"""
