"""vLLM's own OpenAI server in a process of its own, for what kvferry is compared with."""

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
from support.ports import free_ports

from kvcore.process.child import ChildProcess

_START_S = 400.0
_END_S = 0.5
"""A server that is asked to end may leave its engine behind: it is killed, with its group."""
_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
}


@asynccontextmanager
async def vllm_server(model: Path, name: str, options: Sequence[str]) -> AsyncIterator[str]:
    """Its URL, once it serves; all of its processes end with the block, or with this process."""
    (port,) = free_ports(1)
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    said = deque[str](maxlen=60)
    server = await ChildProcess.start(command, on_line=said.append, env=os.environ | _ENV, guard=True)
    try:
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(_START_S), aiohttp.ClientSession() as session:
            while not await _is_healthy(session, url):
                assert server.returncode is None, "\n".join(said)
                await asyncio.sleep(0.1)
        yield url
    finally:
        await server.terminate(_END_S)


async def _is_healthy(session: aiohttp.ClientSession, url: str) -> bool:
    with suppress(aiohttp.ClientError):
        async with session.get(f"{url}/health") as reply:
            return reply.status == 200
    return False
