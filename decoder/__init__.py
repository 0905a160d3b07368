"""The decode node: takes KV from the store and generates tokens. `kvnode` with its role.

Owns nothing beyond its command line and the generate endpoints. Prefills by itself whenever the store cannot help.
"""
