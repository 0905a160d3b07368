"""Anthropic's Messages API over the router's chats.

Owns its bodies and events; what is asked is translated into a chat, and checked and answered as one.
"""
