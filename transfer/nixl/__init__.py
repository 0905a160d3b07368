"""The NIXL transport: agents of both ends over NIXL's own bindings.

Owns agents, registrations and connections. Never shared memory.
"""
