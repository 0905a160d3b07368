"""Who asks, and what that tenant may: API keys checked, rates and concurrency held, wrong keys counted by address.

Owns what is refused before a request gets to its route. The keys themselves are `kvcore.tenants`'.
"""
