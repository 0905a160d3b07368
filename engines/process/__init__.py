"""An engine in a process of its own, and the link between it and its node.

Owns the child's life, the frames between both ends and their bounds. What it offers is `engines.base.Engine`.
"""
