"""Asks the other processes of this router. Owns the calls: each has a deadline, and a failure is a value."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

import aiohttp
import msgspec

from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import process_name, process_urls
from kvcore.errors import KVFerryError
from kvcore.ports import why_unreachable
from kvcore.process.http_client import processes_session
from kvcore.trust.opening import ClusterTrust
from router.processes.limits import ProcessLimits
from router.processes.reports import ProcessPlace

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sibling:
    """Another process: its name, and where it is asked."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class Said(Generic[T]):
    """What one answered, or why it did not."""

    sibling: Sibling
    value: T | None = None
    problem: str | None = None


class Siblings:
    """`session`: for the ports of their own. Closed by its owner."""

    def __init__(
        self, siblings: Sequence[Sibling], session: aiohttp.ClientSession, limits: ProcessLimits = ProcessLimits()
    ) -> None:
        self._siblings, self._session, self._limits = siblings, session, limits

    def __repr__(self) -> str:
        return f"<Siblings {', '.join(one.name for one in self._siblings)}>"

    async def structs(self, path: str, kind: type[T]) -> list[Said[T]]:
        """Of each what it answers to GET `path`."""
        return [_decoded(said, kind) for said in await self.texts(path)]

    async def texts(self, path: str) -> list[Said[bytes]]:
        """The same as it is."""
        return list(await asyncio.gather(*(self._ask(one, path) for one in self._siblings)))

    async def _ask(self, sibling: Sibling, path: str) -> Said[bytes]:
        try:
            async with asyncio.timeout(self._limits.ask_s), self._session.get(sibling.url + path) as reply:
                body = await reply.read()
            if reply.status != 200:
                return Said(sibling, problem=f"HTTP {reply.status}")
            return Said(sibling, body)
        except TimeoutError:
            return Said(sibling, problem="no answer in time")
        except (aiohttp.ClientError, OSError, KVFerryError) as error:
            return Said(sibling, problem=why_unreachable(error))


def siblings_session(trust: ClusterTrust, limits: ProcessLimits = ProcessLimits()) -> aiohttp.ClientSession:
    """To be closed."""
    return processes_session(trust=trust, timeout=aiohttp.ClientTimeout(total=limits.ask_s))


def _decoded(said: Said[bytes], kind: type[T]) -> Said[T]:
    if said.value is None:
        return Said(said.sibling, problem=said.problem)
    try:
        return Said(said.sibling, msgspec.json.decode(said.value, type=kind))
    except msgspec.DecodeError as error:
        return Said(said.sibling, problem=f"an answer that this version does not understand: {error}")


async def open_siblings(
    config: ClusterConfig, stack: AsyncExitStack, trust: ClusterTrust, place: ProcessPlace
) -> Siblings | None:
    """The other processes of this one's router; `stack` closes the calls. None: this process is the whole router."""
    router, urls = place.name.rpartition(".")[0], process_urls(config)
    if not urls:
        return None
    others = [
        Sibling(process_name(router, number), url) for number, url in enumerate(urls, start=1) if number != place.number
    ]
    return Siblings(others, await stack.enter_async_context(siblings_session(trust)))
