"""How tests configure each transport. Loads little: processes of tests import it as they start."""

import os

from kvcore.config.schema import TransportConfig

LIBRARY = os.environ.get("UCX_UNDER_TEST")
"""Path of another libucp than the system's, to hold several UCX to the same tests."""


def transport_config(kind: str) -> TransportConfig:
    """As a cluster of one machine has it. UCX and NIXL: over TCP on loopback."""
    if kind == "ucx":
        return TransportConfig(kind="ucx", devices=["lo"], ucx_library=LIBRARY)
    if kind == "nixl":
        return TransportConfig(kind="nixl", devices=["lo"])
    return TransportConfig(kind=kind)  # type: ignore[arg-type]  # one of the kinds
