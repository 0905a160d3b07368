"""Measuring the way to a peer over a real metadata core and real segments: only reserved room, given back, one at a
time, ended by its deadline."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from support.metadata_rigs import Rig, metadata_rig

from kvcore.clock import SystemClock
from kvcore.config.fields import ByteSize
from kvcore.config.schema import NodeConfig, StoreConfig, TransportConfig
from kvcore.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NodeUnavailableError,
    OverloadedError,
    PeerUnreachableError,
    TransferError,
    TransferProtocolError,
    TransferTimeoutError,
)
from kvcore.types import ChunkKey, NodeInfo, Role
from kvnode.membership import Membership
from kvnode.probe import PeerProber
from kvnode.segment_owner import SegmentOwner
from kvstore.chunk_format import ALIGNMENT
from metadata_server.messages import CommitReply, ReplicaIds, ReserveItem, ReserveRequest
from nodeapi.messages import ProbeRequest
from transfer.base import TransferOp
from transfer.select import TransferSelector, build_transfer

SEGMENT = ByteSize(16 << 20)
STORE = StoreConfig()


class Broken:
    """A transport of kind `tcp` that fails as it is told to; None: it never answers."""

    kind = "tcp"

    def __init__(self, error: TransferError | None, *, quiet: bool = False) -> None:
        self.error, self.quiet, self.closed = error, quiet, False
        self.asked = asyncio.Event()

    def reaches(self, segment: object) -> bool:
        return True

    def register(self, region: memoryview) -> None:
        pass

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        self.asked.set()
        if self.quiet:
            return [None] * len(ops)
        if self.error is None:
            await asyncio.Event().wait()
        return [self.error] * len(ops)

    read = write

    async def aclose(self) -> None:
        self.closed = True


class Pair:
    """Node `a`, which measures, and `b`, whose segment it is."""

    def __init__(self, rig: Rig, infos: dict[str, NodeInfo], owners: dict[str, SegmentOwner], kind: str) -> None:
        self.rig, self.infos, self.owners = rig, infos, owners
        self.transport = TransportConfig(kind=kind)
        self.probers: list[PeerProber] = []

    def prober(self, broken: Broken | None = None) -> PeerProber:
        def open_broken(config: TransportConfig, _: str) -> TransferSelector:
            assert broken is not None
            return TransferSelector(config.kind, [broken])

        made = PeerProber(
            node=self.infos["a"],
            host_id=self.owners["a"].segment.host_id,
            metadata=self.rig.client,
            transport=self.transport,
            store=STORE,
            clock=SystemClock(),
            open_transfer=open_broken if broken else build_transfer,
        )
        self.probers.append(made)
        return made

    def memory(self) -> memoryview:
        memory = self.owners["b"]._memory
        assert memory is not None
        return memory.view

    async def store(self, *lengths: int) -> list[tuple[int, int]]:
        """Chunks of `b`'s, committed in its segment: where they lie."""
        info, segment = self.infos["b"], self.owners["b"].segment
        items = [ReserveItem(key=ChunkKey(bytes([n]) * 16), length=length) for n, length in enumerate(lengths, 1)]
        reply = await self.rig.client.reserve(
            ReserveRequest(
                node_id="b", incarnation=info.incarnation, items=items, prefer_segment=segment.id, ttl_s=30.0
            )
        )
        replicas = [outcome.replica for outcome in reply.outcomes if outcome.replica]
        ids = ReplicaIds(node_id="b", incarnation=info.incarnation, replica_ids=[replica.id for replica in replicas])
        assert await self.rig.client.commit(ids) == CommitReply(committed=[True] * len(lengths))
        return [(replica.offset, replica.length) for replica in replicas]

    async def nothing_is_left(self) -> None:
        async def reservations() -> int:
            return (await self.rig.client.stats()).reservations

        async with asyncio.timeout(60):
            while await reservations():  # noqa: ASYNC110 - a give-back goes on in the background
                await asyncio.sleep(0.001)


@asynccontextmanager
async def pair(kind: str = "shm") -> AsyncIterator[Pair]:
    async with metadata_rig("direct") as rig:
        infos, owners = {}, {}
        try:
            for name in ("a", "b"):
                node = NodeConfig(role=Role.STORE, port=0, segment=SEGMENT)
                infos[name] = NodeInfo(id=name, role=Role.STORE, control_url=f"http://{name}", incarnation=1)
                owners[name] = await SegmentOwner(name, 1, node, TransportConfig(kind=kind)).__aenter__()  # type: ignore[arg-type]
                membership = Membership(
                    rig.client,
                    infos[name],
                    lambda name=name: [owners[name].segment],
                    owners[name].manifests,
                    ttl_s=60.0,
                )
                await membership._take_step()
            subject = Pair(rig, infos, owners, kind)
            yield subject
            for prober in subject.probers:
                await prober.aclose()
        finally:
            for owner in owners.values():
                await owner.__aexit__(None, None, None)


def ask(peer: str = "b", timeout_s: float = 10.0) -> ProbeRequest:
    return ProbeRequest(peer=peer, timeout_s=timeout_s)


@pytest.mark.parametrize("kind", ["shm", "tcp"])
async def test_a_pair_is_measured_in_free_room_alone_and_all_of_it_is_given_back(kind: str) -> None:
    async with pair(kind) as subject:
        places = await subject.store(1 << 20, 3 << 20)
        for offset, length in places:
            subject.memory()[offset : offset + length] = b"K" * length
        report = await subject.prober().probe(ask())
        assert (report.node, report.peer, report.asked, report.transport) == ("a", "b", kind, kind)
        assert report.num_bytes >= 4 << 20 and report.seconds < 10.0
        assert min(report.latency_s, report.put_rate, report.get_rate, report.copy_rate) > 0
        assert report.devices == ([] if kind == "shm" else ["lo"]) and report.link_rate is None
        for offset, length in places:
            assert subject.memory()[offset : offset + length] == b"K" * length
        await subject.nothing_is_left()
        stats = await subject.rig.client.stats()
        assert stats.objects == 2 and stats.counters.get("evicted", 0) == 0


async def test_a_full_segment_is_not_measured_rather_than_emptied() -> None:
    async with pair() as subject:
        await subject.store((15 << 20) + (200 << 10))
        with pytest.raises(OverloadedError, match=r"segment b\.1 is full"):
            await subject.prober().probe(ask())
        assert (await subject.rig.client.stats()).objects == 1


async def test_in_little_room_little_is_moved() -> None:
    async with pair() as subject:
        await subject.store(14 << 20)
        prober = subject.prober()
        assert repr(prober) == "<PeerProber of a, idle>"
        report = await prober.probe(ask())
        assert 64 << 10 <= report.num_bytes < 1 << 20 and report.num_bytes % ALIGNMENT == 0


@pytest.mark.parametrize("peer", ["nobody", ""])
async def test_a_peer_without_a_segment_is_named(peer: str) -> None:
    async with pair() as subject:
        with pytest.raises(NodeUnavailableError, match=f"no segment of node {peer}"):
            await subject.prober().probe(ask(peer))


@pytest.mark.parametrize("wrong", [ask("a"), ask(timeout_s=0.0), ask(timeout_s=1e9), ask(timeout_s=float("nan"))])
async def test_a_wrong_question_is_refused(wrong: ProbeRequest) -> None:
    async with pair() as subject:
        with pytest.raises(InvalidRequestError):
            await subject.prober().probe(wrong)


async def test_a_transport_that_cannot_reach_the_peer_is_an_error_and_leaves_nothing() -> None:
    async with pair("shm") as subject:
        subject.transport = TransportConfig(kind="tcp")  # b serves no TCP
        with pytest.raises(PeerUnreachableError, match="cannot be reached by transport tcp"):
            await subject.prober().probe(ask())
        await subject.nothing_is_left()


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (Broken(PeerUnreachableError("gone")), PeerUnreachableError),
        (Broken(TransferTimeoutError("late")), TransferTimeoutError),
        (Broken(None, quiet=True), TransferProtocolError),
    ],
    ids=["peer dies", "peer is silent", "bytes do not arrive"],
)
async def test_what_happens_on_the_way_is_told_and_leaves_nothing(broken: Broken, error: type[TransferError]) -> None:
    async with pair() as subject:
        with pytest.raises(error):
            await subject.prober(broken).probe(ask())
        assert broken.closed
        await subject.nothing_is_left()


async def test_a_peer_that_never_answers_ends_by_the_deadline() -> None:
    async with pair() as subject:
        broken = Broken(None)
        with pytest.raises(DeadlineExceededError, match=r"from a to b did not end within 0\.1 s"):
            await subject.prober(broken).probe(ask(timeout_s=0.1))
        assert broken.closed
        await subject.nothing_is_left()


async def test_one_measurement_at_a_time_and_the_next_when_it_has_ended() -> None:
    async with pair() as subject:
        broken = Broken(None)
        prober = subject.prober(broken)
        first = asyncio.create_task(prober.probe(ask()))
        await broken.asked.wait()
        with pytest.raises(OverloadedError, match="measuring already"):
            await prober.probe(ask())
        first.cancel()  # as when the client leaves
        with pytest.raises(asyncio.CancelledError):
            await first
        assert broken.closed
        await subject.nothing_is_left()
        broken.error = PeerUnreachableError("gone")
        with pytest.raises(PeerUnreachableError):
            await prober.probe(ask())


async def test_nothing_is_written_once_the_engines_reservations_are_given_back() -> None:
    async with pair() as subject:
        broken = Broken(None)
        prober = subject.prober(broken)
        running = asyncio.create_task(prober.probe(ask()))
        await broken.asked.wait()
        async with prober.work.paused():
            assert broken.closed
            with pytest.raises(NodeUnavailableError, match="has just ended"):
                await prober.probe(ask())
        with pytest.raises(NodeUnavailableError, match="its engine ended"):
            await running
        await subject.nothing_is_left()
