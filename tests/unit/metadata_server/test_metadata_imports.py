"""Registration in pieces: what a segment gives while it is told, late and repeated pieces, and large ones in turn."""

import asyncio
from itertools import pairwise

import msgspec
import pytest
from support.metadata_rigs import end
from support.metadata_words import (
    FIRST_GENERATION,
    TTL_S,
    entry,
    granted,
    in_pieces,
    keys,
    new_state,
    piece,
    put,
    registration,
    reservation,
    segment,
    stored,
)

from kvcore.clock import ManualClock
from metadata_server.account_messages import ImportReply
from metadata_server.core import MetadataCore
from metadata_server.endpoints import HEARTBEAT, IMPORT, STATS
from metadata_server.index.state import MetadataState
from metadata_server.limits import ServerLimits
from metadata_server.messages import HeartbeatRequest, LeaveRequest, QuarantineItem, QuarantineReason, QuarantineRequest


def joined(state: MetadataState, node_id: str = "a", units: int = 16, now: float = 0.0) -> int:
    """The node registers; the number under which it is to tell."""
    reply = state.register(in_pieces(registration(node_id, units=units)), now)
    (name, number) = next(iter(reply.wanted.items()))
    assert (name, reply.imported, reply.refused) == (segment(node_id).id, 0, 0)
    return number


def test_chunks_are_found_piece_by_piece_and_room_is_given_once_all_are_told() -> None:
    state = new_state()
    number = joined(state, units=4)
    assert number > FIRST_GENERATION
    assert state.import_piece(piece("a", number, [entry(1, 0), entry(2, 2)]), 0.0).imported == 2
    assert stored(state, [1, 2, 3], 0.0) == [1, 2]
    assert granted(state.reserve(reservation("a", [9], prefer="a.1"), 0.0)) == []
    reply = state.match(keys(1, 3), 0.0)
    assert (len(reply.replicas), reply.rebuilding) == (1, True)
    stats = state.stats(0.0, 0)
    assert (stats.rebuilding, [line.rebuilding for line in stats.segments]) == (1, [True])
    state.check_invariants(0.0)
    assert state.import_piece(piece("a", number, [entry(3, 3)], last=True), 0.0).imported == 1
    (only,) = granted(state.reserve(reservation("a", [9]), 0.0))
    assert only.offset == 4096  # the one unit that nothing lies in
    assert (state.stats(0.0, 0).rebuilding, state.match(keys(1), 0.0).rebuilding) == (0, False)
    state.check_invariants(0.0)


def test_what_is_told_first_is_evicted_first() -> None:
    state = new_state(low_watermark=1.0)
    number = joined(state, units=3)
    state.import_piece(piece("a", number, [entry(1, 2, generation=5)]), 0.0)
    state.import_piece(piece("a", number, [entry(2, 0, generation=6), entry(3, 1, generation=7)], last=True), 0.0)
    put(state, "a", [4], 0.0)
    assert stored(state, [1, 2, 3, 4], 0.0) == [2, 3, 4]


def test_a_piece_told_twice_counts_once_and_one_that_overlaps_is_refused() -> None:
    state = new_state()
    number = joined(state)
    first = piece("a", number, [entry(1, 0, units=2), entry(2, 4)])
    assert state.import_piece(first, 0.0) == ImportReply(known=True, imported=2, refused=0)
    assert state.import_piece(first, 0.0) == ImportReply(known=True, imported=2, refused=0)
    wrong = [entry(3, 1), entry(4, 16), entry(1, 8), msgspec.structs.replace(entry(5, 9), offset=1)]
    assert state.import_piece(piece("a", number, wrong, last=True), 0.0) == ImportReply(
        known=True, imported=0, refused=4
    )
    state.check_invariants(0.0)
    # a late copy, once all is told: its room may be another chunk's since
    assert state.import_piece(piece("a", number, [entry(6, 10)], last=True), 0.0) == ImportReply(known=True)
    assert stored(state, [1, 2, 6], 0.0) == [1, 2]


def test_a_late_piece_of_an_earlier_telling_is_not_noted() -> None:
    state = new_state()
    earlier = joined(state)
    state.import_piece(piece("a", earlier, [entry(1, 0)]), 0.0)
    number = joined(state)  # its addresses changed, say: what was told stays
    assert number > earlier
    assert not state.import_piece(piece("a", earlier, [entry(2, 1)], last=True), 0.0).known
    assert state.stats(0.0, 0).rebuilding == 1
    state.leave(LeaveRequest(node_id="a", incarnation=1), 0.0)
    assert state.stats(0.0, 0).rebuilding == 0
    assert not state.import_piece(piece("a", number, [entry(2, 1)]), 0.0).known
    again = joined(state)
    assert not state.import_piece(piece("a", number, [entry(2, 1)]), 0.0).known
    assert state.import_piece(piece("a", again, [], last=True), 0.0).known
    assert stored(state, [1, 2], 0.0) == []


def test_pieces_renew_the_lease_and_without_any_the_node_ends() -> None:
    state = new_state()
    number = joined(state)
    for at in range(4):
        assert state.import_piece(piece("a", number, [entry(at, at)]), at * (TTL_S - 0.1)).known
    late = 3 * (TTL_S - 0.1) + TTL_S
    assert not state.import_piece(piece("a", number, [], last=True), late).known
    assert state.nodes(late).nodes == []
    state.check_invariants(late)


def test_a_segment_of_which_all_is_known_is_not_asked_for_again() -> None:
    state = new_state()
    state.register(registration("a", units=4), 0.0)
    put(state, "a", [1, 2], 0.0)
    reply = state.register(in_pieces(registration("a", units=4)), 0.0)
    assert reply.wanted == {} and stored(state, [1, 2], 0.0) == [1, 2]
    assert len(granted(state.reserve(reservation("a", [3]), 0.0))) == 1


def test_a_node_that_goes_back_to_telling_all_at_once_is_not_waited_for() -> None:
    state = new_state()
    number = joined(state)
    state.import_piece(piece("a", number, [entry(1, 0)]), 0.0)
    reply = state.register(registration("a", entries=[entry(2, 1, 2), entry(1, 0, 1)]), 0.0)
    assert (reply.imported, reply.wanted, state.stats(0.0, 0).rebuilding) == (2, {}, 0)
    assert stored(state, [1, 2], 0.0) == [1, 2]
    state.check_invariants(0.0)


def test_a_chunk_found_damaged_meanwhile_gives_its_place_up() -> None:
    state = new_state()
    number = joined(state)
    state.import_piece(piece("a", number, [entry(1, 0, units=3), entry(2, 3)]), 0.0)
    ((bad,),) = state.match(keys(1), 0.0).replicas
    state.quarantine(QuarantineRequest(items=[QuarantineItem(replica=bad, reason=QuarantineReason.CHECKSUM)]), 0.0)
    assert state.import_piece(piece("a", number, [entry(3, 1)], last=True), 0.0).imported == 1
    state.check_invariants(0.0)


def test_lookups_say_so_until_every_node_that_lives_has_been_heard() -> None:
    state = new_state()
    state.began(10.0)
    assert state.match(keys(1), 10.0).rebuilding
    assert not state.match(keys(1), 10.0 + TTL_S).rebuilding


def large(node_id: str, number: int, first: int) -> bytes:
    entries = [entry(first + at, first + at) for at in range(512)]
    return msgspec.msgpack.encode(piece(node_id, number, entries))


@pytest.mark.parametrize("nodes", [2, 8])
async def test_other_calls_are_answered_between_any_two_large_pieces(nodes: int) -> None:
    names = [f"n{number}" for number in range(nodes)]
    state = new_state()
    core = MetadataCore(state, ManualClock(), ServerLimits(max_in_turn=nodes))
    now = ManualClock().now()
    numbers = {name: joined(state, name, units=8192, now=now) for name in names}
    order: list[str] = []

    async def tell(name: str, first: int) -> None:
        reply = msgspec.msgpack.decode(await core.dispatch(IMPORT.path, large(name, numbers[name], first)))
        assert reply["imported"] == 512
        order.append(name)

    async def ask() -> None:
        for _ in range(2 * nodes):
            await core.dispatch(STATS.path, b"")
            beat = HeartbeatRequest(node_id="n0", incarnation=1)
            await core.dispatch(HEARTBEAT.path, msgspec.msgpack.encode(beat))
            order.append("ask")
            await asyncio.sleep(0)

    await asyncio.gather(*(tell(name, 0) for name in names), ask())
    assert [name for name in order if name != "ask"] == names
    told = [at for at, name in enumerate(order) if name != "ask"]
    assert all(after - before > 1 for before, after in pairwise(told))
    core.state.check_invariants(now)


async def test_with_too_many_waiting_a_piece_is_to_be_sent_again() -> None:
    state = new_state()
    core = MetadataCore(state, ManualClock(), ServerLimits(max_in_turn=1, again_s=0.5))
    number = joined(state, units=8192, now=ManualClock().now())
    first = asyncio.create_task(core.dispatch(IMPORT.path, large("a", number, 0)))
    await asyncio.sleep(0)
    reply = await core.dispatch(IMPORT.path, large("a", number, 512))
    assert msgspec.msgpack.decode(reply, type=ImportReply) == ImportReply(known=True, again_s=0.5)
    await first
    again = await core.dispatch(IMPORT.path, large("a", number, 512))
    assert msgspec.msgpack.decode(again, type=ImportReply).imported == 512


async def test_a_piece_whose_sender_left_lets_the_next_one_in() -> None:
    state = new_state()
    core = MetadataCore(state, ManualClock())
    number = joined(state, units=8192, now=ManualClock().now())
    tasks = [asyncio.create_task(core.dispatch(IMPORT.path, large("a", number, 512 * at))) for at in range(3)]
    await asyncio.sleep(0)
    await end(tasks[0])  # type: ignore[arg-type]
    await end(tasks[1])  # type: ignore[arg-type]
    assert msgspec.msgpack.decode(await tasks[2])["imported"] == 512
