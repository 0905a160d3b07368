"""Several servers that share the index: what each gives out, who is refused, and what the records say of the set."""

import asyncio
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from support.metadata_rigs import end
from support.metadata_words import (
    FIRST_GENERATION,
    UNIT,
    entry,
    granted,
    ids,
    in_pieces,
    key,
    keys,
    new_state,
    piece,
    registration,
    reservation,
    segment,
)
from support.server_files import config_with

from kvcore.clock import SystemClock
from kvcore.config.servers import as_server_at, own_part
from kvcore.errors import ConfigError, MetadataProtocolError, NodeRefusedError
from kvcore.partitions import Part, Partitions
from kvferry.launch.processes import ProcessKind, plan_processes
from metadata_server.index.state import MetadataState
from metadata_server.leading.terms import new_index
from metadata_server.messages import ManifestEntry, RegisterRequest, Room
from metadata_server.partitions.membership import join_set
from metadata_server.records.memory import memory_records
from metadata_server.service import serves_mooncake
from metadata_server.versions import SPOKEN

AB = Partitions(("a", "b"))
ABC = Partitions(("a", "b", "c"))


def part_state(part: Part, **settings: Any) -> MetadataState:
    return new_state(speaks=replace(SPOKEN, part=part), **settings)


def joining(part: Part, node_id: str = "n", units: int = 16, entries: list[ManifestEntry] | None = None):
    """As a node that was started with these partitions registers at one of them."""
    start, length = part.slice_of(units * UNIT)
    request = replace(SPOKEN, part=part).greet(registration(node_id, units=units, entries=entries))
    manifests = [msgspec.structs.replace(m, room=Room(start=start, length=length)) for m in request.segments]
    return msgspec.structs.replace(request, segments=manifests)


@pytest.fixture
def both() -> list[MetadataState]:
    states = [part_state(Part(AB, number)) for number in range(2)]
    for number, state in enumerate(states):
        assert state.register(joining(Part(AB, number)), 0.0).spoken.part == Part(AB, number)
    return states


def test_no_two_partitions_give_out_the_same_bytes_and_together_all_of_them(both):
    given: list[tuple[int, int]] = []
    for first, state in zip((0, 100), both, strict=True):
        replicas = granted(state.reserve(reservation("n", list(range(first, first + 20))), 1.0))
        assert len(replicas) == 8
        given += [(replica.offset, replica.length) for replica in replicas]
        state.check_invariants(1.0)
    assert sorted(given) == [(at * UNIT, UNIT) for at in range(16)]


def test_a_number_says_whose_it_is(both):
    for number, state in enumerate(both):
        replicas = granted(state.reserve(reservation("n", [1, 2, 3]), 1.0))
        assert {replica.id % 2 for replica in replicas} == {number}
        assert all(state.commit(ids("n", replicas), 1.0).committed)
        assert all(state.commit(ids("n", replicas), 1.0).committed), "told twice"
        state.reserve(reservation("n", [4]), 1.0)
        leases = [state.match(keys(1), 1.0, lease_s=5.0, node_id="n", incarnation=1).lease_id for _ in range(3)]
        assert {lease % 2 for lease in leases} == {number} and len(set(leases)) == 3
        state.check_invariants(1.0)


def test_what_one_call_reserved_has_a_number_that_no_other_partition_gives(both):
    for number, state in enumerate(both):
        granted(state.reserve(reservation("n", [1]), 1.0))
        ((grant, _),) = state._reservations.open_grants()
        assert grant.number % 2 == number, "the janitor counts and ends it by this"


def test_numbers_stay_so_behind_chunks_that_were_found_with_other_ones():
    part = Part(ABC, 2)
    for generation in range(FIRST_GENERATION * 2, FIRST_GENERATION * 2 + 3):
        state = part_state(part)
        state.register(joining(part, entries=[entry(1, 14, generation)]), 0.0)
        (replica,) = granted(state.reserve(reservation("n", [2]), 0.0))
        assert replica.generation > generation and replica.id % 3 == 2


def test_what_lies_in_anothers_slice_is_not_taken_in():
    part = Part(AB, 1)
    found = [entry(1, 0), entry(2, 7, units=2), entry(3, 8), entry(4, 15)]
    whole = part_state(part)
    assert whole.register(joining(part, entries=found), 0.0).imported == 2
    told = part_state(part)
    (number,) = told.register(in_pieces(joining(part)), 0.0).wanted.values()
    assert told.import_piece(piece("n", number, found, last=True), 0.0).imported == 2
    for state in (whole, told):
        assert [n for n in range(1, 5) if state.complete_prefix([key(n)], 0.0)] == [3, 4]
        assert state.stats(0.0, 0).segments[0].room_bytes == 8 * UNIT
        state.check_invariants(0.0)


def refused(state: MetadataState, request: RegisterRequest) -> str:
    with pytest.raises(NodeRefusedError) as error:
        state.register(request, 0.0)
    assert not state.nodes(0.0).nodes
    return error.value.message


def test_who_knows_another_set_is_refused_by_name():
    a = part_state(Part(ABC, 0))
    assert refused(a, joining(Part(AB, 0))) == (
        "node n was started with an index of partitions a, b, the metadata server with an index of partitions a, b, c: "
        "start all with one file"
    )
    assert "with an index of one server" in refused(a, SPOKEN.greet(registration("n")))
    assert "with an index of one server" in refused(a, registration("n"))
    assert "at partition c of the index, the metadata server at a" in refused(a, joining(Part(ABC, 2)))
    assert "partitions a, b, the metadata server with an index of one" in refused(new_state(), joining(Part(AB, 0)))


def test_a_segment_without_a_room_would_be_all_of_it(both):
    request = joining(Part(AB, 0), "m")
    bare = msgspec.structs.replace(request, segments=registration("m").segments)
    with pytest.raises(MetadataProtocolError, match="room is missing"):
        both[0].register(bare, 0.0)


@pytest.mark.parametrize("room", [Room(start=1, length=UNIT), Room(start=15 * UNIT, length=UNIT + 1)])
def test_a_room_that_cannot_be_is_refused(room):
    request = joining(Part(AB, 0))
    manifest = msgspec.structs.replace(request.segments[0], room=room)
    with pytest.raises(MetadataProtocolError, match="has no room from"):
        part_state(Part(AB, 0)).register(msgspec.structs.replace(request, segments=[manifest]), 0.0)


def test_a_room_does_not_move(both):
    manifest = msgspec.structs.replace(joining(Part(AB, 0)).segments[0], room=Room(start=0, length=UNIT))
    with pytest.raises(MetadataProtocolError, match="which cannot change"):
        both[0].register(msgspec.structs.replace(joining(Part(AB, 0)), segments=[manifest]), 1.0)


def test_pins_have_their_share_of_the_slice(both):
    state = both[0]
    assert state.pins(None, 0.0).most_bytes == segment("n").size_bytes // 4  # half of half


# --- the set's record --------------------------------------------------------------------------------------------


@pytest.fixture
async def records():
    kept = memory_records(SystemClock())
    running = asyncio.create_task(kept.run())
    yield kept
    await end(running)


async def test_the_first_server_writes_the_set_and_one_of_another_does_not_begin(records):
    for _ in range(2):
        await join_set(records, AB)
    for other in (ABC, Partitions(("b", "a")), None):
        with pytest.raises(ConfigError, match="the index has partitions a, b, and this file says"):
            await join_set(records, other)
    await join_set(records, AB)


async def test_the_set_is_changed_by_order_alone(records):
    await join_set(records, AB)
    await join_set(records, ABC, change=True)
    with pytest.raises(ConfigError, match="partitions a, b, c, and this file says partitions a, b"):
        await join_set(records, AB)
    await join_set(records, None, change=True)
    await join_set(records, None)


async def test_an_index_of_one_server_writes_no_record(records):
    await join_set(records, None)
    assert not (await records.listing("")).records


# --- the file ----------------------------------------------------------------------------------------------------

ETCD = {"kind": "etcd", "endpoints": ["http://127.0.0.1:2379"]}
TWO = [{"name": "a", "port": 8701, "standbys": ["127.0.0.1:8703"]}, {"name": "b", "port": 8702}]


def test_each_server_of_each_partition_is_started_and_knows_which_it_is(tmp_path):
    config = config_with(tmp_path, records=ETCD, partitions=TWO)
    plans = [plan for plan in plan_processes(config, tmp_path / "c") if plan.kind is ProcessKind.METADATA_SERVER]
    assert [(plan.name, plan.command[-2:]) for plan in plans] == [
        ("metadata-server-a", ("--at", "127.0.0.1:8701")),
        ("metadata-server-a-2", ("--at", "127.0.0.1:8703")),
        ("metadata-server-b", ("--at", "127.0.0.1:8702")),
    ]
    first, second = ["127.0.0.1:8703"], ["127.0.0.1:8701"]
    for address, number, standbys in (("8701", 0, first), ("8703", 0, second), ("8702", 1, list[str]())):
        seen = as_server_at(config, f"127.0.0.1:{address}").metadata_server
        assert own_part(seen) == Part(AB, number)
        assert (seen.port, seen.standbys) == (int(address), standbys)
    with pytest.raises(ConfigError, match=r"--at HOST:PORT: missing; .* 127\.0\.0\.1:8701, 127\.0\.0\.1:8703, "):
        as_server_at(config, None)
    with pytest.raises(ConfigError, match=r"--at 127\.0\.0\.1:9: the file's"):
        as_server_at(config, "127.0.0.1:9")


def test_a_server_of_a_partition_says_which_it_is(tmp_path):
    config = as_server_at(config_with(tmp_path, partitions=[{"name": "x", "port": 8701}, TWO[1]]), "127.0.0.1:8702")
    state = new_index(config, SystemClock(), 7)
    assert state.speaks.greet(state.nodes(0.0)).spoken.part == Part(Partitions(("x", "b")), 1)


@pytest.mark.parametrize("port", [None, 8790])
def test_mooncakes_metadata_is_not_the_second_partitions(tmp_path, port):
    mooncake = {"enabled": True, **({"port": port} if port else {})}
    whole = config_with(tmp_path, partitions=[{"name": "x", "port": 8701}, TWO[1]], mooncake=mooncake)
    for address, served in (("127.0.0.1:8701", True), ("127.0.0.1:8702", False)):
        assert serves_mooncake(as_server_at(whole, address).metadata_server) is served
    assert serves_mooncake(config_with(tmp_path, mooncake=mooncake).metadata_server)


def test_a_file_without_partitions_is_as_before(tmp_path):
    config = config_with(tmp_path)
    assert own_part(config.metadata_server) is None and as_server_at(config, None) is config
    assert new_index(config, SystemClock(), 7).speaks == SPOKEN


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"partitions": TWO}, r"partitions\[0\]\.standbys: .* set records"),
        ({"partitions": TWO[1:], "port": 8709}, "metadata_server.port: each of the partitions has its own"),
        ({"partitions": TWO[1:], "host": "10.0.0.1"}, "metadata_server.host: each"),
        ({"partitions": TWO[1:] * 2}, r"partitions\[1\]\.name: 'b' is the name of another one"),
        ({"partitions": [{"name": "a/b", "port": 1}]}, "a name of letters, digits"),
        ({"partitions": [{"name": "a", "port": 0}]}, r"partitions\[0\]\.port: 0 is any free one"),
        ({"partitions": [{"name": "a", "prot": 1}]}, r"partitions\[0\]\.prot: 1: unknown key \(did you mean port"),
        ({"partitions": [{"name": "a"}]}, r"partitions\[0\]\.port: missing"),
        ({"partitions": [*TWO[1:], {"name": "c", "port": 8702}]}, r"is metadata_server\.partitions\[0\]\.port already"),
        ({"partitions": TWO[1:], "records": {"kind": "sqlite", "path": "x"}}, "has a file of its own; take it out"),
        ({"partitions": [{"name": f"p{n}", "port": n + 1} for n in range(65)]}, "at most 64"),
    ],
)
def test_what_a_file_may_not_say_of_partitions(tmp_path, server, said):
    with pytest.raises(ConfigError, match=said):
        config_with(tmp_path, **server)
