"""What plain vLLM servers tell of their prefix caches, over ZeroMQ.

Owns sockets. What was told lies in `router.routing.told`.
"""
