"""What every system stands on: the common setting, and child processes that serve HTTP and leave nothing behind."""

import asyncio
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.vllm_pd_threads import group_members
from kvcore.ports import listen
from kvcore.process.child import ChildProcess

START_S = 600.0
STOP_S = 30.0
POLL_S = 0.1
BLOCK = 128
MAX_CONTEXT = 8192
REPOSITORY = Path(__file__).resolve().parent.parent
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "PYTHONPATH": str(REPOSITORY),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What all systems have in common."""

    model: Path
    folder: Path
    """For logs and configurations, on a disk; and `shared`, in memory."""
    shared: Path
    context_bytes: int
    """KV of MAX_CONTEXT tokens."""
    session: aiohttp.ClientSession

    @property
    def kv_cache_bytes(self) -> int:
        """Of each vLLM: a few of the longest prompts."""
        return 4 * self.context_bytes

    def vllm_words(self) -> list[str]:
        """Arguments of `vllm serve`, the same in every system."""
        words = f"--dtype float32 --block-size {BLOCK} --max-model-len {MAX_CONTEXT} --max-num-batched-tokens 2048"
        return [*words.split(), "--enforce-eager", "--kv-cache-memory-bytes", str(self.kv_cache_bytes)]


def free_port() -> int:
    """One that was free a moment ago."""
    with listen("127.0.0.1", 0) as bound:
        return int(bound.getsockname()[1])


async def until(check: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
    """Poll. TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while True:
            if await check():
                return
            await asyncio.sleep(POLL_S)


@asynccontextmanager
async def process(
    setting: Setting, name: str, command: Sequence[str], health: str, environment: Mapping[str, str] = {}
) -> AsyncIterator[int]:
    """A child process, once `health` answers 200; gives its process group. Its output goes to NAME.log. RuntimeError
    with the end of it if it dies before that. All of its group has ended afterwards."""
    last: deque[str] = deque(maxlen=25)
    with (setting.folder / f"{name}.log").open("a", buffering=1) as log:

        def on_line(line: str) -> None:
            last.append(line)
            log.write(line + "\n")

        async def up() -> bool:
            if child.returncode is not None:
                raise RuntimeError("\n".join([f"{name} ended with {child.returncode}:", *last]))
            return await _healthy(setting.session, health)

        child = await ChildProcess.start(command, on_line=on_line, env={**os.environ, **_ENVIRONMENT, **environment})
        try:
            await until(up, START_S)
            yield child.pid
        finally:
            left = _shared_files(child.pid)
            await child.terminate(STOP_S)
            for file in left:
                file.unlink(missing_ok=True)


def _shared_files(group: int) -> set[Path]:
    """What the processes of a group have mapped from /dev/shm: vLLM and LMCache leave it there when they are ended."""
    found: set[Path] = set()
    for pid in group_members(group):
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found |= {Path(name) for name in re.findall(r"(/dev/shm/\S+)$", maps, re.MULTILINE)}
    return found


async def _healthy(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=2)) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
