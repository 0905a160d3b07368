"""The router's HTTP surface: OpenAI's endpoints, their schema, errors and streams.

Owns what clients send and see. How a request is answered is `router.answering`'s.
"""
