"""Texts in prompts whose KV is reused wherever they stand.

Owns their names. What is done with them is the engines'.
"""
