"""A worker process of the transfer benchmark, asked over a Unix socket: one JSON line a question, one an answer."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.children import Child, program

ANSWER_S = 120.0


@dataclass(frozen=True, slots=True)
class Link:
    """The asking end. `process` is the worker's."""

    process: Child
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, **question: Any) -> dict[str, Any]:
        """The answer; RuntimeError with what went wrong at the worker's end."""
        self.writer.write(json.dumps(question).encode() + b"\n")
        async with asyncio.timeout(ANSWER_S):
            line = await self.reader.readline()
        answer: dict[str, Any] = json.loads(line or '{"failed": "the worker ended"}')
        if "failed" in answer:
            raise RuntimeError(f"{question}: {answer['failed']}")
        return answer


@asynccontextmanager
async def worker(command: Sequence[str]) -> AsyncIterator[Link]:
    """Start `command --fd N`; it says `up` when it can be asked over that descriptor."""
    ours, theirs = socket.socketpair()
    try:
        async with program([*command, "--fd", str(theirs.fileno())], r"^(up)$", [theirs.fileno()]) as process:
            theirs.close()
            reader, writer = await asyncio.open_connection(sock=ours)
            yield Link(process, reader, writer)
            writer.close()
    finally:
        theirs.close()
        ours.close()
