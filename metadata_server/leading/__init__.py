"""Which of several metadata servers leads: the election over records, what a leader begins with, how callers follow.

Owns the record of who leads, the tokens of terms and the generations of lives. Decides nothing about the index, and
speaks no HTTP.
"""
