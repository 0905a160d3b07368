"""The lease: forgotten, another epoch, server away and back, leave; the decisions and the shell."""

import asyncio
from collections.abc import Callable

import msgspec
import pytest
from support.router_fakes import spec

from kvcore.chunk_keys import owner_of
from kvcore.clock import ManualClock
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError, NodeRefusedError
from kvcore.types import NodeInfo, Role, Segment
from kvnode.limits import NodeLimits
from kvnode.membership import LeaseKeeper, Membership, Step
from metadata_server.account_messages import ImportReply, ImportRequest
from metadata_server.bounds import MAX_ITEMS
from metadata_server.cache_messages import HUNG_WRITERS, ReleaseWriterRequest
from metadata_server.client import MetadataClient
from metadata_server.messages import (
    IN_PIECES,
    TOLD_OWNERS,
    HeartbeatReply,
    LeaveRequest,
    ManifestEntry,
    RegisterReply,
    RegisterRequest,
    SegmentManifest,
)
from metadata_server.versions import Protocols

TTL_S = 0.03  # heartbeats every 10 ms
SPEC = spec()
LIMITS = NodeLimits(spread_s=0.0, piece_entries=2, longest_piece_pause_s=0.01, max_listed=3)
OLDER, NEWER = Protocols(oldest=1, newest=3), Protocols(oldest=1, newest=IN_PIECES)
SEGMENT = Segment(id="p0.1", node_id="p0", size_bytes=4096, host_id="h", addresses={})


class FakeServer:
    """A MetadataTransport that knows nodes, has an epoch and can be away. `wanted`: what it asks registrations for."""

    def __init__(self) -> None:
        self.epoch = "a"
        self.away = False
        self.refuses = ""
        self.known = False
        self.speaks = NEWER
        self.wanted: dict[str, int] = {}
        self.pieces: list[ImportRequest] = []
        self.answers: list[ImportReply | Exception] = []
        """To the next pieces; then each is noted."""
        self.paths: list[str] = []
        self.registered: list[RegisterRequest] = []
        self.role = ""
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
            wanted = self.wanted if self.registered[-1].in_pieces is True else {}
            reply = RegisterReply(epoch=self.epoch, imported=0, refused=0, wanted=wanted)
            return msgspec.msgpack.encode(self.speaks.greet(reply))
        if path.endswith("import_piece"):
            piece = msgspec.msgpack.decode(body, type=ImportRequest)
            answer = self.answers.pop(0) if self.answers else ImportReply(known=True, imported=len(piece.entries))
            if isinstance(answer, Exception):
                raise answer
            if answer.known and not answer.again_s:
                self.pieces.append(piece)
            return msgspec.msgpack.encode(answer)
        if path.endswith("leave"):
            self.left.append(msgspec.msgpack.decode(body, type=LeaveRequest))
            return b"\x80"
        if path.endswith("release_writer"):
            self.released.append(msgspec.msgpack.decode(body, type=ReleaseWriterRequest))
            return b"\x80"
        return msgspec.msgpack.encode(
            self.speaks.greet(HeartbeatReply(epoch=self.epoch, known=self.known, role=self.role))
        )

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(holds)

    def serves_as(self, role: Role) -> bool:
        """Whether the last registration was under this role."""
        return bool(self.registered) and self.registered[-1].node.role is role

    def heard(self, what: str) -> bool:
        """Whether the last call was this."""
        return bool(self.paths) and self.paths[-1].endswith(what)

    async def aclose(self) -> None:
        pass


class Rig:
    def __init__(self) -> None:
        self.server = FakeServer()
        self.scans = 0
        self.entries: list[ManifestEntry] = []
        node = NodeInfo(id="p0", role=Role.PREFILLER, control_url="http://x", incarnation=1)
        self.clock = ManualClock()
        client = MetadataClient(self.server, self.clock, 1.0)
        self.membership = Membership(
            client, node, lambda: [SEGMENT], self.scan, ttl_s=TTL_S, draw=self.draw, limits=LIMITS
        )

    def draw(self) -> float:
        self.clock.advance(2.0)  # the client's pause after a failure is over
        return 0.5

    async def scan(self) -> list[SegmentManifest]:
        self.scans += 1
        return [SegmentManifest(segment=SEGMENT, entries=self.entries)]

    async def __aenter__(self) -> "Rig":
        self.task = asyncio.create_task(self.membership.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def test_it_registers_again_under_the_role_that_was_ordered_and_under_its_own_when_none_is() -> None:
    async with Rig() as rig:
        for ordered, role in (("decoder", Role.DECODER), ("of a later version", Role.PREFILLER)):
            rig.server.role = ordered
            await rig.server.until(lambda role=role: rig.server.serves_as(role))  # type: ignore[misc]
            assert rig.membership.node.role is role and rig.server.registered[-1].node.incarnation == 1


async def test_away_at_start_is_not_fatal_and_the_node_joins_when_it_is_back() -> None:
    rig = Rig()
    rig.server.away = True
    async with rig:
        await rig.server.until(lambda: len(rig.server.paths) >= 5)
        assert not rig.membership.joined
        assert rig.scans == 0  # a scan may take seconds, and who would hear of it?
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


def listed(*generations: int) -> list[ManifestEntry]:
    """Chunks as a scan gives them: the newest first."""
    return [ManifestEntry(key=bytes(16), offset=at, length=1, generation=at) for at in generations]  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["forgotten", "another life"])
async def test_a_server_that_lost_us_is_told_what_lies_in_the_segments_oldest_first(what: str) -> None:
    async with Rig() as rig:
        await rig.server.until(lambda: rig.server.heard("heartbeat") and rig.membership.joined)
        assert rig.server.registered[0].segments == [SegmentManifest(segment=SEGMENT)]
        rig.entries, rig.server.wanted = listed(5, 4, 3, 2, 1), {SEGMENT.id: 7}
        if what == "forgotten":
            rig.server.known = False
        else:
            rig.server.epoch = "b"
        await rig.server.until(lambda: len(rig.server.pieces) == 3)
        again = rig.server.registered[1]
        assert (rig.scans, again.in_pieces, again.segments) == (1, True, [SegmentManifest(segment=SEGMENT)])
        told = [([entry.generation for entry in piece.entries], piece.last) for piece in rig.server.pieces]
        assert told == [([1, 2], False), ([3, 4], False), ([5], True)]
        assert {(p.node_id, p.incarnation, p.segment_id, p.number) for p in rig.server.pieces} == {
            ("p0", 1, SEGMENT.id, 7)
        }


async def test_heartbeats_go_on_while_pieces_are_told_and_each_is_sent_until_it_is_noted() -> None:
    async with Rig() as rig:
        await rig.server.until(lambda: rig.membership.joined)
        rig.entries, rig.server.wanted = listed(3, 2, 1), {SEGMENT.id: 7}
        away = MetadataUnavailableError("away")
        rig.server.answers = [ImportReply(known=True, again_s=3 * TTL_S), away, away]
        rig.server.known = False
        await rig.server.until(lambda: len(rig.server.pieces) == 2)
        assert [len(piece.entries) for piece in rig.server.pieces] == [2, 1]
        first = [path.rpartition("/")[2] for path in rig.server.paths].index("import_piece")
        assert "/v1/nodes/heartbeat" in rig.server.paths[first:]
        assert (rig.scans, len(rig.server.registered)) == (1, 2)


@pytest.mark.parametrize("answer", [ImportReply(known=False), MetadataProtocolError("malformed")])
async def test_a_piece_that_is_not_taken_makes_the_node_register_again(answer: ImportReply | Exception) -> None:
    async with Rig() as rig:
        await rig.server.until(lambda: rig.membership.joined)
        rig.entries, rig.server.wanted = listed(1), {SEGMENT.id: 7}
        rig.server.answers = [answer]
        rig.server.known = False
        await rig.server.until(lambda: len(rig.server.pieces) == 1)
        assert (rig.scans, len(rig.server.registered)) == (2, 3)


async def test_a_server_that_takes_no_pieces_is_told_at_once_as_much_as_it_takes() -> None:
    async with Rig() as rig:
        rig.server.speaks = OLDER
        await rig.server.until(lambda: rig.membership.joined)
        rig.entries = listed(5, 4, 3, 2, 1)
        rig.server.known = False
        await rig.server.until(lambda: len(rig.server.registered) == 2)
        request = rig.server.registered[1]
        assert request.in_pieces is msgspec.UNSET
        assert request.segments == [SegmentManifest(segment=SEGMENT, entries=rig.entries[:3])]


@pytest.mark.parametrize("protocol", [TOLD_OWNERS, TOLD_OWNERS - 1, IN_PIECES - 1])
async def test_whose_chunks_they_are_is_told_to_a_server_that_knows_owners(protocol: int) -> None:
    owner = owner_of(b"tenant")
    async with Rig() as rig:
        rig.server.speaks = Protocols(oldest=1, newest=protocol)
        await rig.server.until(lambda: rig.membership.joined)
        rig.entries = [msgspec.structs.replace(entry, owner=owner) for entry in listed(2, 1)]
        rig.server.wanted = {SEGMENT.id: 7}
        rig.server.known = False
        await rig.server.until(lambda: rig.server.pieces != [] or rig.server.registered[-1].segments[0].entries != [])
        whole = rig.server.registered[-1].segments[0].entries
        told = rig.server.pieces[0].entries if protocol >= IN_PIECES else whole
        assert {entry.owner for entry in told} == {owner if protocol == TOLD_OWNERS else msgspec.UNSET}


def test_what_an_older_server_is_told_is_within_its_bounds() -> None:
    """A list over its bounds would be refused each time: the node could never join again."""
    assert NodeLimits().max_listed <= MAX_ITEMS and NodeLimits().piece_entries <= MAX_ITEMS


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
        await rig.server.until(lambda: rig.membership.joined)
        asked = 0

        def segments() -> list[Segment]:
            nonlocal asked
            asked += 1
            if asked == 1:
                rig.membership.announce_again()  # what is being announced is out of date
            return [SEGMENT]

        rig.membership._segments = segments
        rig.membership.announce_again()
        await rig.server.until(lambda: len(rig.server.registered) == 3)
        await rig.server.until(lambda: rig.server.heard("heartbeat") and rig.membership.joined)
        assert (asked, rig.scans, len(rig.server.registered)) == (2, 0, 3)


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


async def test_a_hung_engines_holdings_are_given_back_where_the_server_knows_the_difference() -> None:
    rig = Rig()
    rig.server.speaks = Protocols(1, HUNG_WRITERS)
    await rig.membership.release_writer(hangs=True)
    assert rig.server.paths == [], "its version is not known yet"
    async with rig:
        await rig.server.until(lambda: rig.server.heard("heartbeat"))
        await rig.membership.release_writer(hangs=True)
        rig.membership._client._protocol = HUNG_WRITERS - 1
        await rig.membership.release_writer(hangs=True)
    assert rig.server.released == [ReleaseWriterRequest(node_id="p0", incarnation=1, hangs=True)]


async def test_membership_says_who_it_is_and_who_knows_it() -> None:
    rig = Rig()
    assert repr(rig.membership) == (
        "<Membership prefiller p0.1, known to no server, 0 failures in a row, 0 registrations>"
    )
    async with rig:
        await rig.server.until(lambda: rig.server.heard("heartbeat"))
        assert "known to epoch a, 0 failures in a row, 1 registrations>" in repr(rig.membership)
