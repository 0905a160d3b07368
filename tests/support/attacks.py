"""What a stranger who reaches a cluster's ports can try, each as a program that says whether it worked.

None of them has the cluster's secret; all know its words as well as its own processes do.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from support.cluster import ClusterHandle

from kvcore.types import ChunkKey, NodeInfo, Role, Segment
from metadata_server.account_messages import Stats
from metadata_server.cache_messages import EvictRequest
from metadata_server.messages import (
    LeaveRequest,
    MatchRequest,
    RegisterRequest,
    ReserveItem,
    ReserveRequest,
    SegmentManifest,
)

MSGPACK = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
FLOOD = 50


@dataclass
class Stranger:
    """On the same network, with a session of its own. `stats`: what the metadata server said of itself before."""

    cluster: ClusterHandle
    session: aiohttp.ClientSession
    stats: Stats
    refusals: list[str] = field(default_factory=list)

    async def call(self, url: str, body: object = None, method: str = "POST") -> bool:
        """Whether the server did it."""
        raw = b"" if body is None else msgspec.msgpack.encode(body)
        async with self.session.request(method, url, data=raw or None, headers=MSGPACK) as reply:
            answer = await reply.read()
            if reply.status == 401:
                self.refusals.append(msgspec.msgpack.decode(answer)["error"]["code"])
            return reply.status < 300

    async def tell(self, path: str, body: object) -> bool:
        """The same, of the metadata server."""
        return await self.call(self.cluster.metadata_url + path, body)

    def node(self, name: str) -> NodeInfo:
        """What it announced."""
        return next(node for node in self.stats.nodes if node.id == name)

    def registration(self, name: str, url: str = "http://127.0.0.1:9", incarnation: int = 1 << 52) -> RegisterRequest:
        """A node that was never started."""
        segment_id, addresses = f"{name}.{incarnation:x}", {"tcp": "127.0.0.1:9"}
        segment = Segment(id=segment_id, node_id=name, size_bytes=1 << 20, host_id="h", addresses=addresses)
        node = NodeInfo(
            id=name,
            role=Role.DECODER,
            control_url=url,
            incarnation=incarnation,
            cluster=self.cluster.config.cluster,
            model=self.cluster.config.model.name,
        )
        return RegisterRequest(node=node, segments=[SegmentManifest(segment=segment)], ttl_s=5.0)


@asynccontextmanager
async def stranger(cluster: ClusterHandle, connector: aiohttp.BaseConnector | None = None) -> AsyncIterator[Stranger]:
    """One that is new here. `connector`: by which he connects."""
    async with aiohttp.ClientSession(connector=connector) as session:
        yield Stranger(cluster, session, await cluster.stats())


async def fake_node(it: Stranger) -> bool:
    """Be a node that nobody started."""
    return await it.tell("/v1/nodes/register", it.registration("stranger"))


async def takeover(it: Stranger) -> bool:
    """Be a node that lives, in another start of it."""
    it.registration("decode-0")
    await it.tell("/v1/nodes/leave", LeaveRequest(node_id="decode-0", incarnation=it.node("decode-0").incarnation))
    return await it.tell("/v1/nodes/register", it.registration("decode-0"))


async def leave_of_another(it: Stranger) -> bool:
    """Have a node that lives forgotten, with all that lies on it."""
    return await it.tell(
        "/v1/nodes/leave", LeaveRequest(node_id="prefill-0", incarnation=it.node("prefill-0").incarnation)
    )


async def abort_of_another(it: Stranger) -> bool:
    """End somebody's request on its node."""
    return await it.call(f"{it.cluster.node_url('decode-0')}/v1/requests/somebodys", method="DELETE")


async def probe_of_another(it: Stranger) -> bool:
    """Have a node fill its links."""
    return await it.call(f"{it.cluster.node_url('prefill-0')}/v1/probe", {"peer": "decode-0", "timeout_s": 5.0})


async def report_of_a_node(it: Stranger) -> bool:
    """Look at what a node does."""
    return await it.call(f"{it.cluster.node_url('decode-0')}/v1/info", method="GET")


async def whole_index(it: Stranger) -> bool:
    """Read which chunk lies where."""
    return await it.call(f"{it.cluster.metadata_url}/v1/snapshot", method="GET")


async def events(it: Stranger) -> bool:
    """Follow everything that changes, many times at once."""
    url = f"{it.cluster.metadata_url}/v1/events?from_seq=0"
    async with contextlib.AsyncExitStack() as stack:
        asked = [await stack.enter_async_context(it.session.get(url, headers=MSGPACK)) for _ in range(FLOOD)]
        return all(reply.status == 200 for reply in asked)


async def lease_flood(it: Stranger) -> bool:
    """Keep chunks from eviction for an hour, in nobody's name."""
    request = MatchRequest(keys=[ChunkKey(bytes(16))], lease_s=3600.0)
    return all([await it.tell("/v1/objects/match", request) for _ in range(FLOOD)])


async def node_flood(it: Stranger) -> bool:
    """Be very many nodes."""
    return all([await it.tell("/v1/nodes/register", it.registration(f"flood-{at}")) for at in range(FLOOD)])


async def reserve_all(it: Stranger) -> bool:
    """Take all free room in a node's name, which evicts what lies there."""
    node = it.node("decode-0")
    items = [ReserveItem(key=ChunkKey(at.to_bytes(16, "big")), length=1 << 20) for at in range(8)]
    request = ReserveRequest(node_id=node.id, incarnation=node.incarnation, items=items, ttl_s=60.0)
    return await it.tell("/v1/objects/reserve", request)


async def evict_others(it: Stranger) -> bool:
    """Have others' chunks removed."""
    return await it.tell("/v1/cache/evict", EvictRequest(keys=[ChunkKey(bytes(16))]))


async def drain_by_the_router(it: Stranger) -> bool:
    """Give the router an operator's order."""
    url = f"{it.cluster.url}/v1/nodes/drain"
    async with it.session.post(url, json={"node": "decode-1"}) as reply:
        if reply.status == 401:
            it.refusals.append((await reply.json())["error"]["code"])
        return reply.status == 200


async def fetch_any_url(it: Stranger) -> bool:
    """Have the cluster's processes ask a server of ours, by registering it as a node's."""
    asked = asyncio.Event()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        if not await it.tell("/v1/nodes/register", it.registration("elsewhere", url)):
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                await asked.wait()
        return asked.is_set()


OVER_HTTP: tuple[Callable[[Stranger], Awaitable[bool]], ...] = (
    report_of_a_node,
    whole_index,
    events,
    lease_flood,
    fake_node,
    fetch_any_url,
    node_flood,
    reserve_all,
    evict_others,
    abort_of_another,
    probe_of_another,
    drain_by_the_router,
    takeover,
    leave_of_another,
)
"""In this order: the last ones change what the others look at."""


def secret_override(folder: Any) -> str:
    """A new secret in `folder`, as an override that names it."""
    from kvferry.secret import run_new

    run_new(folder / "secret", rotate=False)
    return f"security.secret.file={folder / 'secret'}"
