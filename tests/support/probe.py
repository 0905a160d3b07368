"""What a node answers that has measured its way to another."""

from typing import Any

from nodeapi.messages import ProbeReport


def probe_report(**fields: Any) -> ProbeReport:
    """Of a fast pair over TCP, on an interface that states 25 Gb/s."""
    usual: dict[str, Any] = {
        "node": "p0",
        "peer": "d0",
        "asked": "auto",
        "transport": "tcp",
        "shown": "tcp",
        "devices": ["eth0"],
        "link_rate": 25e9 / 8,
        "latency_s": 100e-6,
        "put_rate": 2.5e9,
        "get_rate": 2.5e9,
        "copy_rate": 10e9,
        "num_bytes": 64 << 20,
        "seconds": 1.5,
    }
    return ProbeReport(**{**usual, **fields})
