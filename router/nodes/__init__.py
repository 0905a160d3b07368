"""The nodes as the router knows them: who there is, who answers, how healthy, and vLLM servers that are not ours.

Owns probing and breakers. Chooses nothing.
"""
