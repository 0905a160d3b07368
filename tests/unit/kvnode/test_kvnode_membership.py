"""The lease: forgotten, another epoch, server away and back, leave; the decisions and the shell."""

import asyncio
from collections.abc import Callable

import msgspec
import pytest
from support.router_fakes import spec

from kvcore.clock import ManualClock
from kvcore.errors import MetadataUnavailableError, NodeRefusedError
from kvcore.types import NodeInfo, Role, Segment
from kvnode.membership import LeaseKeeper, Membership, Step
from metadata_server.client import MetadataClient
from metadata_server.messages import (
    HeartbeatReply,
    LeaveRequest,
    RegisterReply,
    RegisterRequest,
    ReleaseWriterRequest,
    SegmentManifest,
)

TTL_S = 0.03  # heartbeats every 10 ms
SPEC = spec()
SEGMENT = Segment(id="p0.1", node_id="p0", size_bytes=4096, host_id="h", addresses={})


class FakeServer:
    """A MetadataTransport that knows nodes, has an epoch and can be away."""

    def __init__(self) -> None:
        self.epoch = "a"
        self.away = False
        self.refuses = ""
        self.known = False
        self.paths: list[str] = []
        self.registered: list[RegisterRequest] = []
        self.left: list[LeaveRequest] = []
        self.released: list[ReleaseWriterRequest] = []
        self._changed = asyncio.Condition()

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        async with self._changed:
            self.paths.append(path)
            self._changed.notify_all()
        if self.away:
            raise MetadataUnavailableError("away")
        if path.endswith("register"):
            if self.refuses:
                raise NodeRefusedError(self.refuses)
            self.registered.append(msgspec.msgpack.decode(body, type=RegisterRequest))
            self.known = True
            return msgspec.msgpack.encode(RegisterReply(epoch=self.epoch, imported=0, refused=0))
        if path.endswith("leave"):
            self.left.append(msgspec.msgpack.decode(body, type=LeaveRequest))
            return b"\x80"
        if path.endswith("release_writer"):
            self.released.append(msgspec.msgpack.decode(body, type=ReleaseWriterRequest))
            return b"\x80"
        return msgspec.msgpack.encode(HeartbeatReply(epoch=self.epoch, known=self.known))

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5), self._changed:
            await self._changed.wait_for(holds)

    def heard(self, what: str) -> bool:
        """Whether the last call was this."""
        return bool(self.paths) and self.paths[-1].endswith(what)

    async def aclose(self) -> None:
        pass


class Rig:
    def __init__(self) -> None:
        self.server = FakeServer()
        self.scans = 0
        node = NodeInfo(id="p0", role=Role.PREFILLER, control_url="http://x", incarnation=1)
        self.clock = ManualClock()
        client = MetadataClient(self.server, self.clock, 1.0)
        self.membership = Membership(client, node, self.scan, ttl_s=TTL_S, draw=self.draw)

    def draw(self) -> float:
        self.clock.advance(2.0)  # the client's pause after a failure is over
        return 0.5

    async def scan(self) -> list[SegmentManifest]:
        self.scans += 1
        return [SegmentManifest(segment=SEGMENT)]

    async def __aenter__(self) -> "Rig":
        self.task = asyncio.create_task(self.membership.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def test_away_at_start_is_not_fatal_and_the_node_joins_when_it_is_back() -> None:
    rig = Rig()
    rig.server.away = True
    async with rig:
        await rig.server.until(lambda: len(rig.server.paths) >= 5)
        assert not rig.membership.joined
        assert rig.scans == 1  # a scan may take seconds, and who would hear of it?
        rig.server.away = False
        await rig.server.until(lambda: bool(rig.server.registered) and rig.server.heard("heartbeat"))
        assert rig.membership.joined
        assert rig.membership.registrations == 1


async def test_a_node_that_is_refused_says_so_once_and_tries_until_it_is_taken_in(caplog) -> None:
    rig = Rig()
    rig.server.refuses = "node p0 is alive at http://y"
    async with rig:
        await rig.server.until(lambda: len(rig.server.paths) >= 9)
        assert (rig.membership.joined, rig.membership.refused) == (False, "node p0 is alive at http://y")
        assert "refused: node p0 is alive at http://y, " in repr(rig.membership)
        said = [record for record in caplog.records if record.levelname == "ERROR"]
        assert ["refused node=p0" in record.getMessage() for record in said] == [True]
        rig.server.refuses = "node p0 is of cluster 'b', not 'a'"
        seen = len(rig.server.paths)
        await rig.server.until(lambda: len(rig.server.paths) >= seen + 4)
        assert "of cluster" in rig.membership.refused
        rig.server.away = True  # what it would say now nobody knows
        seen = len(rig.server.paths)
        await rig.server.until(lambda: len(rig.server.paths) >= seen + 2)
        assert "of cluster" in rig.membership.refused
        rig.server.away, rig.server.refuses = False, ""
        await rig.server.until(lambda: rig.server.heard("heartbeat") and bool(rig.server.registered))
        assert (rig.membership.joined, rig.membership.refused) == (True, "")


@pytest.mark.parametrize("what", ["forgotten", "another life"])
async def test_a_server_that_lost_us_gets_a_fresh_scan(what: str) -> None:
    async with Rig() as rig:
        await rig.server.until(lambda: rig.server.heard("heartbeat"))
        if what == "forgotten":
            rig.server.known = False
        else:
            rig.server.epoch = "b"
        await rig.server.until(lambda: len(rig.server.registered) == 2 and rig.server.heard("heartbeat"))
        assert rig.scans == 2
        assert rig.server.registered[1].segments[0].segment == SEGMENT


async def test_outage_shorter_than_the_lease_does_not_register_again() -> None:
    async with Rig() as rig:
        await rig.server.until(lambda: rig.server.heard("heartbeat"))
        rig.server.away = True
        seen = len(rig.server.paths)
        await rig.server.until(lambda: len(rig.server.paths) > seen)
        rig.server.away = False
        rig.clock.advance(2.0)
        await rig.server.until(lambda: len(rig.server.paths) > seen + 2)
        assert len(rig.server.registered) == 1


async def test_fingerprint_is_announced_at_once() -> None:
    async with Rig() as rig:
        await rig.server.until(lambda: rig.server.heard("heartbeat"))
        rig.membership.announce(SPEC)
        await rig.server.until(lambda: len(rig.server.registered) == 2)
        said = rig.server.registered[-1].node
        assert (said.fingerprint, said.tokenizer_digest) == (SPEC.fingerprint, SPEC.tokenizer_digest)
        assert said.incarnation == 1


async def test_segments_that_change_are_announced_at_once_also_while_they_are_being_announced() -> None:
    async with Rig() as rig:
        await rig.server.until(lambda: rig.server.heard("heartbeat"))
        scan = rig.scan

        async def scan_and_change() -> list[SegmentManifest]:
            if rig.scans == 1:
                rig.membership.announce_again()  # what is being scanned is out of date
            return await scan()

        rig.membership._scan = scan_and_change
        rig.membership.announce_again()
        await rig.server.until(lambda: len(rig.server.registered) == 3)
        await rig.server.until(lambda: rig.server.heard("heartbeat"))
        assert (rig.scans, len(rig.server.registered)) == (3, 3)


async def test_leave_names_the_incarnation_and_never_raises() -> None:
    rig = Rig()
    await rig.membership.leave()
    assert rig.server.left == [LeaveRequest(node_id="p0", incarnation=1)]
    rig.server.away = True
    await rig.membership.leave()


def test_heartbeats_come_every_third_of_the_ttl_with_jitter() -> None:
    lease = LeaseKeeper(6.0, 0.1)
    assert (lease.step, lease.delay_s(0.0)) == (Step.REGISTER, 0.0)
    lease.on_registered(RegisterReply(epoch="a", imported=0, refused=0))
    assert lease.step is Step.HEARTBEAT
    assert (lease.delay_s(0.0), lease.delay_s(0.5)) == (pytest.approx(1.8), pytest.approx(2.0))


def test_pauses_after_failures_grow_to_the_heartbeat_period() -> None:
    lease = LeaseKeeper(6.0, 0.1)
    pauses = []
    for _ in range(8):
        lease.on_failure()
        pauses.append(lease.delay_s(0.5))
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0])
    assert LeaseKeeper(6.0, 0.1, failures=10_000).delay_s(0.5) == pytest.approx(2.0)


@pytest.mark.parametrize("away", [False, True])
async def test_a_dead_engines_holdings_are_given_back_if_the_server_is_there(away: bool) -> None:
    rig = Rig()
    rig.server.away = away
    await rig.membership.release_writer()
    assert rig.server.paths == ["/v1/nodes/release_writer"]
    assert rig.server.released == ([] if away else [ReleaseWriterRequest(node_id="p0", incarnation=1)])


async def test_membership_says_who_it_is_and_who_knows_it() -> None:
    rig = Rig()
    assert repr(rig.membership) == (
        "<Membership prefiller p0.1, known to no server, 0 failures in a row, 0 registrations>"
    )
    async with rig:
        await rig.server.until(lambda: rig.server.heard("heartbeat"))
        assert "known to epoch a, 0 failures in a row, 1 registrations>" in repr(rig.membership)
