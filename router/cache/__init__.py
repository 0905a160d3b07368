"""What the cache gives to the requests of one router: hit rate in tokens, what was missed and why, and what would help.

Owns counts and hashes of prompts, never a prompt. Watches ended requests; changes nothing about any.
"""
