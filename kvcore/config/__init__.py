"""The cluster file: its schema, how it is read and parsed, and the rules that take several fields.

Owns every key and its bounds. Opens no socket; what a machine can do is the doctor's question.
"""
