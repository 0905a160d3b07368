"""What this machine has: its addresses; and sizes in words."""

import socket


def is_local(host: str) -> bool:
    """Whether an address of `host` is this machine's. An unknown name is not."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    return any(_binds(family, address) for family, _, _, _, address in found)


def _binds(family: int, address: object) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(address)  # type: ignore[arg-type]  # as getaddrinfo gave it
        except OSError:
            return False
    return True


def size_text(num_bytes: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
