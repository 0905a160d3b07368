"""The clients of benchmarks.faults: so many completions, every second one streamed, and what each of them saw.

Owns no system and no fault: it asks a URL, and remembers when something came. A request is answered if all of its
answer came in time, as OpenAI's API says; what its text should be is the caller's to know.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from kvcore.process.http_client import http_session

AT_ONCE = 8
ANSWER_S = 30.0
"""A request that is not answered by then counts as one that never is."""
_FAILED = (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError)


@dataclass(slots=True)
class Seen:
    """What came of one request. Times in seconds from its sending; `silence_s`: the longest time in which nothing came
    of a stream that had begun. Of an answer that was not streamed only `total_s` is known."""

    number: int
    streamed: bool
    text: str = ""
    problem: str = ""
    """Empty: it was answered."""
    left: bool = False
    """Its client went before the end, as it was told to."""
    first_s: float = 0.0
    silence_s: float = 0.0
    total_s: float = 0.0
    id: str = ""
    """As the router calls it."""


@dataclass(slots=True)
class Load:
    """`prompts` are asked of `url`, so many at a time. `leave`: every second client goes, after that many seconds."""

    url: str
    model: str
    prompts: Sequence[str]
    max_tokens: int
    more: dict[str, object] = field(default_factory=dict)
    """Fields of each body."""
    leave: float | None = None
    at_once: int = AT_ONCE
    seen: list[Seen] = field(default_factory=list)
    """Of requests that have ended."""
    _ended: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def run(self) -> list[Seen]:
        """Until each has ended, in whatever way; in the order of the prompts."""
        numbers = iter(range(len(self.prompts)))
        async with http_session(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def client() -> None:
                for number in numbers:
                    await self._one(session, number)

            async with asyncio.TaskGroup() as clients:
                for _ in range(self.at_once):
                    clients.create_task(client())
        return sorted(self.seen, key=lambda one: one.number)

    async def ended(self, count: int) -> None:
        """Until so many have."""
        async with self._ended:
            await self._ended.wait_for(lambda: len(self.seen) >= count)

    async def _one(self, session: aiohttp.ClientSession, number: int) -> None:
        now = asyncio.get_running_loop().time
        seen, began = Seen(number, streamed=number % 2 == 0), now()
        leaves = self.leave is not None and number % 4 < 2
        try:
            async with asyncio.timeout(self.leave if leaves else ANSWER_S):
                await self._ask(session, seen, began)
        except TimeoutError:
            seen.left = leaves
            seen.problem = "" if leaves else f"no answer within {ANSWER_S:g} s"
        except _FAILED as error:
            seen.problem = f"{type(error).__name__}: {error}"[:160]
        seen.total_s = now() - began
        if seen.problem and seen.streamed and seen.first_s == 0.0:
            seen.first_s = seen.total_s
        async with self._ended:
            self.seen.append(seen)
            self._ended.notify_all()

    async def _ask(self, session: aiohttp.ClientSession, seen: Seen, began: float) -> None:
        body = {
            "model": self.model,
            "prompt": self.prompts[seen.number],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": seen.streamed,
            **self.more,
        }
        async with session.post(f"{self.url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                said = await reply.text()
                raise ValueError(f"HTTP {reply.status} {said[:100]}")
            if not seen.streamed:
                answer = json.loads(await reply.read())
                seen.id, seen.text = answer["id"], answer["choices"][0]["text"]
                return
            await self._read(reply, seen, began)

    async def _read(self, reply: aiohttp.ClientResponse, seen: Seen, began: float) -> None:
        now = asyncio.get_running_loop().time
        last, reason = began, None
        async for line in reply.content:
            data = line.strip().removeprefix(b"data: ")
            if data == b"[DONE]":
                if reason is None:
                    raise ValueError("the stream ended without a finish reason")
                return
            if not data or data.startswith(b":"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise ValueError(f"an error in the stream: {event['error']}"[:120])
            for choice in event.get("choices", ()):
                seen.text += choice.get("text") or ""
                reason = choice.get("finish_reason") or reason
            seen.id, moment = event.get("id", ""), now()
            if seen.first_s == 0.0:
                seen.first_s = moment - began
            else:
                seen.silence_s = max(seen.silence_s, moment - last)
            last = moment
        raise ValueError("the stream broke off")
