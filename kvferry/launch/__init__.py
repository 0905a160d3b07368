"""Bringing a cluster up on this machine and keeping it up: its processes, their order, their logs.

Owns restarts and what is shown meanwhile. What a process does is its own package's.
"""
