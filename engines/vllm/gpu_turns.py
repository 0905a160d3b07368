"""Engines that share a GPU start one after the other.

vLLM measures how much of a GPU's memory its model takes and gives the rest of its share to KV. What another engine
takes meanwhile counts as its own: an H100's second engine was left -0.6 GiB for its KV, and died.
"""

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

from kvcore.errors import ConfigError
from kvcore.state_folder import state_folder
from kvcore.telemetry import log_fields

_logger = logging.getLogger("engines.vllm")


def gpus_of(environ: Mapping[str, str], ranks: int) -> list[str]:
    """The GPUs that an engine of so many ranks takes, as CUDA_VISIBLE_DEVICES names them or by their indexes."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(ranks)]
    return sorted(named[:ranks])


@asynccontextmanager
async def gpu_turn(gpus: Sequence[str], look_s: float = 0.2) -> AsyncIterator[None]:
    """Inside, no other engine of this user and machine is inside for any of these GPUs. Waits for that without end,
    looking every `look_s`; the kernel ends the turn of a process that has died. Without a folder to keep locks in,
    there are no turns."""
    with ExitStack() as locks:
        with suppress(ConfigError, OSError):
            folder = state_folder("")
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            for gpu in gpus:
                await _lock(folder / f"gpu-{gpu.replace('/', '-')}.lock", locks, look_s)
        yield


async def _lock(file: Path, locks: ExitStack, look_s: float) -> None:
    """Held until `locks` closes. Unlocked, and not only closed: vLLM's processes, forked meanwhile, hold it as well."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    locks.callback(os.close, descriptor)
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not told:
                log_fields(_logger, logging.INFO, "waits_for_gpu", another_engine_starts=file.stem)
                told = True
            await asyncio.sleep(look_s)
    locks.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
