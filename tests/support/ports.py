"""Ports that are free now, for processes that must know each other's before they bind."""

import socket


def free_ports(count: int) -> list[int]:
    """All held at once while they are picked, so they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for held in sockets:
        held.bind(("127.0.0.1", 0))
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports
