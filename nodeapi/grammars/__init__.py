"""Grammars that answers must follow: what a client asked for, checked, compiled, and the tokens that may come next.

The router checks with it what engines apply. Owns no request, no model and no logits. Imports kvcore, numpy and
llguidance.
"""
