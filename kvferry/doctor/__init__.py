"""`kvferry doctor`: what can be known before anything is started, and how fast running nodes reach each other.

Each check is a function from a configuration to findings. Changes nothing on the machine.
"""
