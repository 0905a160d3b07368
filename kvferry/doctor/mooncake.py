"""The check of a Mooncake tier: its client can be loaded, the master answers, and RDMA is there if it is asked for."""

import socket
import subprocess
import sys

from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.ports import why_unreachable
from kvferry.doctor.findings import Context, Finding
from kvferry.machine import size_text
from kvstore.tiers.mooncake.tier import PACKAGE, place_of

_SUBJECT = "tiers.mooncake"
_LIBRARIES = "apt install libibverbs1 librdmacm1 libnl-3-200 libnl-route-3-200 libnuma1 libcurl4"


def check_mooncake(context: Context) -> list[Finding]:
    """As a node of this machine will use it. Blocking, up to half a minute where the import hangs."""
    config = context.config.tiers.mooncake
    if config is None:
        return []
    try:
        place = place_of(config, "127.0.0.1")
    except ConfigError as error:
        wrong, _, remedy = error.message.rpartition("; ")
        return [Finding(_SUBJECT, False, wrong or error.message, remedy if wrong else f"correct {_SUBJECT}")]
    if problem := _not_loaded():
        remedy = _LIBRARIES if ".so" in problem else f"pip install {PACKAGE}"
        return [Finding(_SUBJECT, False, f"mooncake.store cannot be imported: {problem}", remedy)]
    try:
        socket.create_connection((place.host, place.port), timeout=config.timeout_s).close()
    except OSError as error:
        remedy = "start mooncake_master, or correct tiers.mooncake.master; without it chunks are computed"
        return [Finding(_SUBJECT, False, f"{place.shown}: {why_unreachable(error)}", remedy)]
    lent = config.global_segment_size
    said = f"each node lends {size_text(lent)} to it" if lent else "no node lends memory to it: others must"
    return [Finding(_SUBJECT, True, f"{place.shown} over {config.protocol}; {said}")]


def mooncake_bytes(config: ClusterConfig) -> int:
    """Memory that a Mooncake tier takes of one node's machine, its buffer counted in full."""
    tier = config.tiers.mooncake
    if tier is None:
        return 0
    return int(tier.global_segment_size or 0) + int(tier.local_buffer_size or 0) + int(tier.in_flight)


def _not_loaded() -> str:
    """Why Mooncake's client cannot be loaded; in a process of its own, as it starts threads and takes signals."""
    command = [sys.executable, "-c", "import mooncake.store"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30.0, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"it ended with {done.returncode}")
