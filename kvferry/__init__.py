"""The front door: command line, cluster launcher, doctor, status, the demo.

Owns wiring and what a person sees. Serving code lives in the packages below.
"""

__version__ = "0.1.0"
