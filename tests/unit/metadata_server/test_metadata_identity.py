"""Who may be a node: its cluster and model, one process an id, and which of a node's starts is the one that counts."""

import logging
from pathlib import Path

import msgspec
import pytest
from support.metadata_rigs import DirectTransport, metadata_rig
from support.metadata_words import TTL_S, granted, ids, new_state, put, registration, reservation, stored

from kvcore.clock import ManualClock
from kvcore.config.file import load_config
from kvcore.errors import NodeRefusedError
from kvcore.identity import ClusterIdentity
from kvcore.types import NodeInfo
from metadata_server.account_messages import Stats
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.index.limits import IndexLimits
from metadata_server.index.state import MetadataState
from metadata_server.leading.terms import new_index
from metadata_server.limits import ServerLimits
from metadata_server.messages import EventKind, HeartbeatRequest, LeaveRequest, RegisterRequest

SIM = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"
PROD = ClusterIdentity("prod", "m")


def incarnations(state: MetadataState, node_id: str, now: float) -> list[int]:
    return [node.incarnation for node in state.nodes(now).nodes if node.id == node_id]


def altered(request: RegisterRequest, **fields: object) -> RegisterRequest:
    """The registration of a node whose info differs so."""
    return msgspec.structs.replace(request, node=msgspec.structs.replace(request.node, **fields))


# --- cluster and model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cluster": "staging"}, "node x at http://x is of cluster 'staging', not 'prod': correct the addresses"),
        ({"cluster": "staging", "model": "m"}, "is of cluster 'staging', not 'prod'"),
        ({"cluster": "prod", "model": "other"}, "node x at http://x serves model 'other', not 'm' as the cluster"),
    ],
)
def test_a_node_of_another_cluster_or_model_is_refused_by_name(fields, said):
    state = new_state(identity=PROD)
    before = state.log.next_seq
    with pytest.raises(NodeRefusedError, match=said):
        state.register(altered(registration("x"), **fields), 0.0)
    assert (state.nodes(0.0).nodes, state.nodes(0.0).segments, state.log.next_seq) == ([], [], before)
    assert state.counters["nodes_refused"] == 1


@pytest.mark.parametrize("identity", [PROD, ClusterIdentity("prod"), ClusterIdentity()])
@pytest.mark.parametrize("fields", [{}, {"cluster": "prod"}, {"cluster": "prod", "model": "m"}])
def test_a_node_that_says_nothing_else_is_taken_in_and_events_say_what_it_is(identity, fields):
    state = new_state(identity=identity)
    state.register(altered(registration("x"), fingerprint=b"f" * 16, tokenizer_digest="t1", **fields), 0.0)
    state.register(altered(registration("y"), fingerprint=b"g" * 16, tokenizer_digest="t2", **fields), 0.0)
    up = [event.node for event in state.log.since(1) if event.kind is EventKind.NODE_UP]
    assert [(node.fingerprint[:1], node.tokenizer_digest) for node in up] == [(b"f", "t1"), (b"g", "t2")]
    assert {node.cluster for node in state.nodes(0.0).nodes} == {fields.get("cluster", "")}


def test_a_node_that_registers_again_as_a_foreign_one_stays_what_it_was():
    state = new_state(identity=PROD)
    state.register(registration("x"), 0.0)
    put(state, "x", [1], 0.0)
    with pytest.raises(NodeRefusedError):
        state.register(altered(registration("x"), cluster="staging"), 0.0)
    assert stored(state, [1], 0.0) == [1]


# --- one process an id -------------------------------------------------------------------------------------------


def test_a_second_process_of_an_id_is_refused_while_the_first_ones_lease_lives():
    state = new_state()
    state.register(registration("a", incarnation=5), 0.0)
    put(state, "a", [1], 0.0, incarnation=5)
    for second in (4, 6):
        newcomer = altered(registration("a", incarnation=second), control_url="http://elsewhere")
        with pytest.raises(NodeRefusedError, match="node a is alive at http://a, and this one is at http://elsewhere"):
            state.register(newcomer, TTL_S - 0.01)
    assert incarnations(state, "a", TTL_S - 0.01) == [5] and stored(state, [1], TTL_S - 0.01) == [1]
    state.register(newcomer, TTL_S)
    assert incarnations(state, "a", TTL_S) == [6] and stored(state, [1], TTL_S) == []
    with pytest.raises(NodeRefusedError, match="is alive at http://elsewhere"):
        state.register(registration("a", incarnation=5), TTL_S)  # it was only cut off, and comes back
    state.leave(LeaveRequest(node_id="a", incarnation=6), TTL_S)
    state.register(registration("a", incarnation=5), TTL_S)
    state.check_invariants(TTL_S)


# --- starts of one node ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2)])
def test_a_start_at_the_same_address_ends_what_the_one_before_had_whose_late_messages_are_refused(first, second):
    state = new_state()
    state.register(registration("a", incarnation=first), 0.0)
    state.register(registration("b"), 0.0)
    put(state, "a", [1], 0.0, incarnation=first)
    other = granted(state.reserve(reservation("a", [2], prefer="b.1", incarnation=first), 0.0))
    state.register(registration("a", incarnation=second), 0.0)
    assert stored(state, [1], 0.0) == [] and state.stats(0.0, 0).reservations == 0
    assert state.commit(ids("a", other, incarnation=first), 0.0).committed == [False]
    assert state.commit(ids("a", other, incarnation=second), 0.0).committed == [False]
    put(state, "a", [3], 0.0, incarnation=second)
    with pytest.raises(NodeRefusedError, match="node a at http://a was started again since"):
        state.register(registration("a", incarnation=first), 0.0)
    assert not state.heartbeat(HeartbeatRequest(node_id="a", incarnation=first), 0.0).known
    state.leave(LeaveRequest(node_id="a", incarnation=first), 0.0)
    assert incarnations(state, "a", 0.0) == [second] and stored(state, [3], 0.0) == [3]
    state.check_invariants(0.0)


@pytest.mark.parametrize("now", [0.1, TTL_S + 0.1, 86_400.0])
@pytest.mark.parametrize("stepped", [-1, -3_600_000, +1])
def test_a_node_whose_clock_stepped_back_is_taken_in_at_once(now, stepped):
    """An earlier version takes its incarnations from a clock."""
    state = new_state()
    state.register(registration("a", incarnation=10_000_000), 0.0)
    state.register(registration("a", incarnation=10_000_000 + stepped), now)
    assert incarnations(state, "a", now) == [10_000_000 + stepped]


def test_a_node_is_never_locked_out_for_longer_than_a_lease():
    state = new_state()
    state.register(registration("a", incarnation=2), 0.0)
    state.register(registration("a", incarnation=1), 0.0)  # a dead start's first message, which comes late
    with pytest.raises(NodeRefusedError):
        state.register(registration("a", incarnation=2), 0.0)
    state.register(registration("a", incarnation=2), TTL_S)
    assert incarnations(state, "a", TTL_S) == [2]


def test_of_many_starts_the_last_ones_are_known():
    state = new_state(limits=IndexLimits(max_replaced=2))
    for start in range(1, 5):
        state.register(registration("a", incarnation=start), 0.0)
    for late in (2, 3):
        with pytest.raises(NodeRefusedError):
            state.register(registration("a", incarnation=late), 0.0)
    assert list(state._nodes["a"].replaced) == [2, 3]


# --- what is said of it ------------------------------------------------------------------------------------------


def newcomer(node_id: str, url: str) -> RegisterRequest:
    return altered(registration(node_id, units=0, incarnation=9), control_url=url)


async def test_a_refusal_is_logged_once_and_shown_while_the_node_still_asks(caplog):
    clock = ManualClock()
    core = MetadataCore(new_state(), clock, ServerLimits(refused_s=10.0, max_refused=2))
    client = MetadataClient(DirectTransport(core), clock, 1.0)

    async def refuse(node_id: str, url: str) -> None:
        with pytest.raises(NodeRefusedError):
            await client.register(newcomer(node_id, url))

    async def shown() -> list[str]:
        return [refused.node.control_url for refused in (await client.stats()).refused]

    with caplog.at_level(logging.WARNING, logger="metadata_server"):
        for _ in range(3):
            await client.register(registration("a"))
            await refuse("a", "http://1")
            clock.advance(1.0)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("node_refused node=a reason=") and "alive at http://a" in said
    await refuse("a", "http://2")
    assert await shown() == ["http://1", "http://2"]
    await refuse("a", "http://3")
    assert await shown() == ["http://2", "http://3"], "of many the last ones"
    await client.leave(LeaveRequest(node_id="a", incarnation=1))
    await client.register(newcomer("a", "http://2"))
    assert await shown() == ["http://3"], "one that was taken in is not refused"
    clock.advance(10.0)
    assert await shown() == []


async def test_the_refusal_crosses_the_wire_as_what_it_is():
    async with metadata_rig("http", identity=PROD) as rig:
        with pytest.raises(NodeRefusedError, match=r"^node x at http://x is of cluster 'staging', not 'prod'"):
            await rig.client.register(altered(registration("x"), cluster="staging"))
        assert (await rig.client.stats()).refused[0].node == NodeInfo(
            id="x", role=registration("x").node.role, control_url="http://x", incarnation=1, cluster="staging"
        )


def test_a_reader_of_an_older_version_reads_the_stats():
    stats = new_state().stats(0.0, 0)
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(stats))
    del raw["refused"]
    assert msgspec.convert(raw, Stats) == stats


def test_a_node_that_is_not_listed_is_refused_by_name():
    state = new_state(identity=ClusterIdentity("prod", node_ids=frozenset({"a"})))
    state.register(registration("a"), 0.0)
    with pytest.raises(NodeRefusedError, match=r"node b at http://b is not listed: add it to security\.nodes"):
        state.register(registration("b"), 0.0)


def at(url: str, node_id: str) -> RegisterRequest:
    request = registration(node_id)
    return msgspec.structs.replace(request, node=msgspec.structs.replace(request.node, control_url=url))


def test_a_listed_node_that_the_file_describes_is_where_the_file_says():
    config = load_config(SIM, ["security.nodes=[prefill-0, prefill-1, decode-0, decode-1, guest]"])
    state, node = new_index(config, ManualClock(), 1), config.nodes["decode-0"]
    state.register(at(f"http://{node.host}:{node.port}", "decode-0"), 0.0)
    state.register(registration("guest"), 0.0)
    with pytest.raises(NodeRefusedError, match=r"decode-1 says that it is at http://evil:1, .* file has it at http://"):
        state.register(at("http://evil:1", "decode-1"), 0.0)
    new_index(load_config(SIM), ManualClock(), 1).register(at("http://elsewhere:1", "decode-1"), 0.0)


async def test_a_start_that_takes_the_place_of_a_live_one_is_logged(caplog):
    async with metadata_rig("direct") as rig:
        await rig.client.register(registration("a"))
        await rig.client.register(registration("a"))
        assert "node_replaced" not in caplog.text
        await rig.client.register(registration("a", incarnation=2))
        assert "node_replaced node=a by=http://a" in caplog.text
        assert (await rig.client.stats()).counters["nodes_replaced"] == 1
