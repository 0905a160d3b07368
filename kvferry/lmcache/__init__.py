"""What LMCache's users bring along: its YAML file and its environment, as a part of our cluster file.

Owns every word of LMCache's. No other package knows one, and nothing here runs LMCache.
"""
