"""How many connections a router has, and the file descriptors that they need. Pure."""

from kvcore.process.descriptors import RESERVED

LEGS_PER_REQUEST = 3
"""Connections of one request at most in the usual case: both legs and a control call."""
_PER_REQUEST = 1 + LEGS_PER_REQUEST
_FEWEST_CLIENTS = 16
_MOST_OPERATORS = 256


def descriptors_needed(max_requests: int, num_nodes: int) -> int:
    """For so many requests at a time: the client's connection of each, its legs', and the probes'."""
    return _PER_REQUEST * max_requests + num_nodes + RESERVED


def clients_at_most(limit: int, num_nodes: int, *, operators: int = 0) -> int:
    """So many connections of clients leave descriptors for the legs of each, and for so many of operators."""
    return max(_FEWEST_CLIENTS, (limit - RESERVED - num_nodes - operators) // _PER_REQUEST)


def operators_at_most(limit: int) -> int:
    """Connections to a port of the operators' own: few ask there, and whoever floods it leaves clients theirs."""
    return max(_FEWEST_CLIENTS, min(_MOST_OPERATORS, limit // 16))
