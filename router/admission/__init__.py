"""Who gets in, when, and who is told at once to come back: turns by fairness, first tokens by their deadlines.

Owns the one queue of the router, and what is refused because it would be late. Chooses no node: the policy does.
"""
