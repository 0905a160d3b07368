"""OpenAI's Responses API over the router's chats.

Owns its bodies and events, and what is kept of answers; what is asked is translated into a chat, and answered as one.
"""
