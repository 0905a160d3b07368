"""Who the tenants of a cluster are: their API keys, what each may have, and the salts that keep their KV apart.

Owns the file of keys, in which no key can be read. Decides nothing about requests: that is `router.tenants`.
"""
