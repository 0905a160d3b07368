"""From pieces of text to the bodies and stream chunks of OpenAI's endpoints.

Owns the form of answers. One formatter an answer; no I/O.
"""
