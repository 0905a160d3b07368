"""The prefill node: computes the KV of prompts and puts it into the store. `kvnode` with its role.

Owns nothing beyond its command line and the prefill endpoint. Never samples a token for a client.
"""
