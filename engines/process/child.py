"""The program of an engine's process: `python -m engines.process.child --fd N`, started by `engines.process.parent`.

Wires the engine with a store of its own (`kvstore.wiring`). Owns nothing else; the node's segment is reached like any
other, through the transports.
"""

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import REGISTRY

from engines.factory import build_engine, engine_config
from engines.process import messages as m
from engines.process.session import OpenedEngine, serve
from kvcore.clock import SystemClock
from kvcore.config.file import node_config
from kvcore.config.schema import VllmEngineConfig
from kvcore.process.service import loop_factory
from kvcore.process.state_dump import dump_on_signal
from kvcore.telemetry import configure_logging, exposition
from kvcore.types import KVSpec
from kvstore.settings import store_settings
from kvstore.store import KVStore
from kvstore.wiring import OpenedStore, open_wiring
from transfer.memory.segment import host_identity

MAX_EXPOSITION_BYTES = 1 << 20
"""vLLM 0.32 has 73 families, 51 KB."""


@asynccontextmanager
async def open_engine(hello: m.EngineHello) -> AsyncIterator[OpenedEngine]:
    """The node's engine with its own way to the store. Raises ConfigError, ModelLoadError."""
    config, clock = hello.config, SystemClock()
    configure_logging(f"{hello.node_name}.engine", config.service.log_level)
    host_id = node_config(config, hello.node_name).host_id or host_identity()
    section = engine_config(config, hello.node_name)
    if isinstance(section, VllmEngineConfig):  # its stores live where its KV does, in vLLM's workers
        from engines.vllm.engine import VllmEngine
        from engines.vllm.start import VllmStart

        start = VllmStart(config, section, hello.node_name, hello.incarnation, host_id)
        async with VllmEngine(start) as vllm:
            yield OpenedEngine(
                vllm,
                vllm.store_counters,
                vllm.transports,
                lambda: exposition(
                    REGISTRY, prefix="vllm:", labels={"node": hello.node_name}, max_bytes=MAX_EXPOSITION_BYTES
                ),
            )
        return
    settings = store_settings(config, node_id=hello.node_name, incarnation=hello.incarnation, host_id=host_id)
    async with open_wiring(settings, clock) as wiring:
        opened: list[OpenedStore] = []

        def make_store(spec: KVSpec) -> KVStore:
            opened.append(wiring.open_store(spec))
            return opened[-1].store

        engine = build_engine(config, hello.node_name, make_store, clock)
        async with engine:  # left before the store, the transports and the client are closed
            yield OpenedEngine(engine, opened[0].totals, opened[0].transports)


def main() -> None:
    """Serve on the socket that the node passed down."""
    parser = argparse.ArgumentParser(prog="engines.process.child", description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    sock = socket.socket(fileno=parser.parse_args().fd)
    configure_logging("engine")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        status = runner.run(_serve(sock))
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # torch and vLLM take seconds to take apart, for nothing; our group ends with us


async def _serve(sock: socket.socket) -> int:
    with dump_on_signal():
        return await serve(sock, open_engine)


if __name__ == "__main__":
    main()
