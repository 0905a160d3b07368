"""Readers of decode legs for tests, and what a fake NodeClient does with a stream of deltas."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from kvcore.errors import DeadlineExceededError
from nodeapi.messages import GenerateRequest, TokenDelta
from nodeapi.protocol import DeltaReader, NodeClient


class Collected:
    """A DeltaReader that keeps all deltas. `takes(delta)`: what `take` answers; `ready` lets others have a turn."""

    def __init__(self, takes: Callable[[TokenDelta], bool] = lambda _: True) -> None:
        self.deltas: list[TokenDelta] = []
        self.waits = 0
        self._takes = takes

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    def take(self, delta: TokenDelta) -> bool:
        self.deltas.append(delta)
        return self._takes(delta)

    async def ready(self) -> bool:
        self.waits += 1
        await asyncio.sleep(0)
        return True


async def deltas_of(client: NodeClient, url: str, request: GenerateRequest, timeout_s: float) -> list[TokenDelta]:
    """All that a decode leg says."""
    reader = Collected()
    await client.generate(url, request, reader, first_s=timeout_s, gap_s=timeout_s)
    return reader.deltas


async def give(deltas: AsyncGenerator[TokenDelta], reader: DeltaReader, *, first_s: float, gap_s: float) -> None:
    """As `NodeClient.generate` does with what comes; closes the stream."""
    limit_s = first_s
    async with aclosing(deltas):
        while True:
            try:
                async with asyncio.timeout(limit_s):
                    delta = await anext(deltas)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise DeadlineExceededError("the node says nothing more") from error
            if not reader.take(delta) and not await reader.ready():
                return
            limit_s = gap_s
