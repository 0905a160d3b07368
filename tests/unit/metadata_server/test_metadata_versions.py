"""Servers and clients of different versions: raw messages with fields that one side has not, and greetings."""

import asyncio
from typing import Any

import msgspec
import pytest
from support.metadata_rigs import DirectTransport, end, until
from support.metadata_words import granted, ids, keys, new_state, put, registration, reservation

from kvcore.clock import ManualClock, SystemClock
from kvcore.errors import MetadataProtocolError
from metadata_server import account_messages as ac
from metadata_server import cache_messages as c
from metadata_server import messages as m
from metadata_server.account_messages import ImportRequest
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.endpoints import ENDPOINTS, NODES, REGISTER, WAIT
from metadata_server.index.state import MetadataState
from metadata_server.subscription import IndexSubscription
from metadata_server.versions import SPOKEN, Protocols

NOW = ManualClock().now()


def some_state(speaks: Protocols = SPOKEN) -> MetadataState:
    """Node a with chunk 1 complete and chunk 2 reserved."""
    state = new_state(speaks=speaks)
    state.register(registration("a"), NOW)
    put(state, "a", [1], NOW)
    return state


def requests(state: MetadataState) -> dict[str, msgspec.Struct | None]:
    """One of each call, with something in it."""
    reserved = granted(state.reserve(reservation("a", [2]), NOW))
    there = state.match(keys(1), NOW).replicas[0][0]
    item = m.QuarantineItem(replica=there, reason=m.QuarantineReason.STALE)
    named = {"node_id": "a", "incarnation": 1}
    return {
        "/v1/nodes/register": registration("a"),
        "/v1/segments/import_piece": ImportRequest(**named, segment_id="a.1", number=1),
        "/v1/nodes/heartbeat": m.HeartbeatRequest(**named),
        "/v1/nodes/leave": m.LeaveRequest(**named),
        "/v1/nodes/release_writer": c.ReleaseWriterRequest(**named),
        "/v1/objects/match": m.MatchRequest(keys=keys(1), lease_s=1.0),
        "/v1/objects/wait": m.WaitRequest(keys=keys(1), timeout_s=0.0),
        "/v1/objects/reserve": reservation("a", [3]),
        "/v1/objects/commit": ids("a", reserved),
        "/v1/objects/abort": ids("a", reserved),
        "/v1/objects/quarantine": m.QuarantineRequest(items=[item]),
        "/v1/leases/release": c.ReleaseRequest(lease_ids=[1]),
        "/v1/leases/renew": c.RenewRequest(**named, lease_ids=[1], lease_s=1.0),
        "/v1/tiers/tell_holdings": m.TellHoldingsRequest(**named, added=keys(5)),
        "/v1/tiers/find_holders": m.FindHoldersRequest(keys=keys(5)),
        "/v1/cache/pin": c.PinRequest(keys=keys(1), ttl_s=5.0),
        "/v1/cache/unpin": c.UnpinRequest(keys=keys(1)),
        "/v1/cache/evict": c.EvictRequest(keys=keys(1)),
        "/v1/cache/expire": c.ExpireRequest(keys=keys(1), ttl_s=5.0),
        "/v1/cache/pins": None,
        "/v1/nodes/order_node": c.NodeOrderRequest(node_id="a", action="drain"),
        "/v1/objects/move_chunks": c.MoveChunksRequest(**named, copied=[], most_bytes=1, ttl_s=1.0),
        "/v1/nodes/node_orders": None,
        "/v1/nodes/rebalance": c.RebalanceRequest(action="start", most_bytes=1),
        "/v1/nodes/rebalancing": None,
        "/v1/janitor/orphans": ac.OrphansRequest(known=["a"], older_s=1.0),
        "/v1/janitor/remove_orphans": ac.RemoveOrphansRequest(kind="pins", ids=["00"], known=[], older_s=1.0),
        "/v1/cache/blend_switches": c.BlendSwitchesRequest(switches=[c.KindSwitch(model="m", kind="part", number=1)]),
        "/v1/nodes": None,
        "/v1/stats": None,
    }


def with_later_fields(raw: Any) -> Any:
    """The same message with a field more in each of its maps, as a newer program sends it (counters are no fields)."""
    if isinstance(raw, dict):
        fixed = {name: raw[name] for name in ("counters", "addresses", "wanted") if name in raw}
        return {name: with_later_fields(value) for name, value in raw.items()} | fixed | {"later": [1]}
    return [with_later_fields(item) for item in raw] if isinstance(raw, list) else raw


def optional_fields(kind: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(kind) if not field.required}


class Altered:
    """A transport to a core that changes the raw requests and replies on their way."""

    def __init__(self, core: MetadataCore, request=lambda raw: raw, reply=lambda raw: raw) -> None:
        self._to, self._request, self._reply = DirectTransport(core), request, reply

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        if body:
            body = msgspec.msgpack.encode(self._request(msgspec.msgpack.decode(body)))
        reply = await self._to.call(path, body, timeout_s)
        return msgspec.msgpack.encode(self._reply(msgspec.msgpack.decode(reply)))

    async def aclose(self) -> None:
        pass


ROWS = {row.path: row for row in ENDPOINTS}


@pytest.mark.parametrize("path", ROWS)
async def test_an_old_client_understands_a_newer_servers_reply(path: str) -> None:
    answers = []
    for reply in (lambda raw: raw, with_later_fields):
        state = some_state()
        request = requests(state)[path]
        client = MetadataClient(Altered(MetadataCore(state, ManualClock()), reply=reply), ManualClock(), 1.0)
        answers.append(await client._call(ROWS[path], request, None))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("path", [row.path for row in ENDPOINTS if row.request])
async def test_a_field_that_the_server_does_not_know_is_refused_by_name(path: str) -> None:
    state = some_state()
    core, body = MetadataCore(state, ManualClock()), msgspec.msgpack.encode(requests(state)[path])
    changed = msgspec.msgpack.decode(body) | {"later": 1}
    with pytest.raises(MetadataProtocolError, match="later"):
        await core.dispatch(path, msgspec.msgpack.encode(changed))


@pytest.mark.parametrize("path", [row.path for row in ENDPOINTS if row.request])
async def test_a_server_takes_an_older_clients_request_without_the_fields_that_came_later(path: str) -> None:
    state = some_state()
    request = requests(state)[path]
    assert request is not None
    core, raw = MetadataCore(state, ManualClock()), msgspec.msgpack.decode(msgspec.msgpack.encode(request))
    for name in optional_fields(type(request)):
        raw.pop(name, None)
    await core.dispatch(path, msgspec.msgpack.encode(raw))


@pytest.mark.parametrize("path", ROWS)
async def test_a_client_takes_an_older_servers_reply_without_the_fields_that_came_later(path: str) -> None:
    optional = optional_fields(ROWS[path].reply)

    def older(raw: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in raw.items() if name not in optional}

    state = some_state()
    request = requests(state)[path]
    client = MetadataClient(Altered(MetadataCore(state, ManualClock()), reply=older), ManualClock(), 1.0)
    await client._call(ROWS[path], request, None)


async def test_an_outcome_that_only_a_newer_server_knows_is_read_as_do_without() -> None:
    def later(raw: dict[str, Any]) -> dict[str, Any]:
        return {**raw, "outcomes": [{"status": "queued", "replica": None}]}

    client = MetadataClient(Altered(MetadataCore(some_state(), ManualClock()), reply=later), ManualClock(), 1.0)
    reply = await client.reserve(reservation("a", [3]))
    assert [outcome.status for outcome in reply.outcomes] == [m.ReserveStatus.UNKNOWN]


# --- greetings ---------------------------------------------------------------------------------------------------

VERSION_1 = Protocols(oldest=1, newest=1)
VERSION_2 = Protocols(oldest=1, newest=2)
ONLY_2 = Protocols(oldest=2, newest=2)


def test_version_1_is_not_said_so_that_programs_from_before_the_fields_understand() -> None:
    for message in (registration("a"), m.RegisterReply(epoch="e", imported=0, refused=0)):
        assert not {"protocol", "oldest_protocol"} & msgspec.msgpack.decode(msgspec.msgpack.encode(message)).keys()
        assert message.spoken == VERSION_1


@pytest.mark.parametrize(
    ("client_speaks", "server_speaks", "version"),
    [(VERSION_1, VERSION_2, 1), (VERSION_2, VERSION_1, 1), (VERSION_2, ONLY_2, 2)],
)
async def test_the_newest_version_that_both_speak_is_used(
    client_speaks: Protocols, server_speaks: Protocols, version: int
) -> None:
    core = MetadataCore(new_state(speaks=server_speaks), ManualClock())
    for call in (REGISTER, NODES):
        client = MetadataClient(DirectTransport(core), ManualClock(), 1.0, speaks=client_speaks)
        assert client.protocol == 1
        await (client.register(registration("a")) if call is REGISTER else client.nodes())
        assert client.protocol == version


async def test_a_node_that_is_too_old_is_refused_by_the_server_and_a_server_by_the_client() -> None:
    core = MetadataCore(new_state(speaks=ONLY_2), ManualClock())
    client = MetadataClient(DirectTransport(core), ManualClock(), 1.0, speaks=VERSION_1)
    said = "node a speaks version 1 of the metadata protocol, the metadata server speaks 2: upgrade node a"
    with pytest.raises(MetadataProtocolError, match=said):
        await client.register(registration("a"))
    assert core.state.nodes(NOW).nodes == []
    with pytest.raises(MetadataProtocolError, match=r"server speaks version 2 .* upgrade this client"):
        await client.nodes()
    core = MetadataCore(some_state(VERSION_1), ManualClock())
    with pytest.raises(MetadataProtocolError, match=r"node b speaks version 2 .* upgrade the metadata server"):
        await MetadataClient(DirectTransport(core), ManualClock(), 1.0, speaks=ONLY_2).register(registration("b"))


@pytest.mark.parametrize(("oldest", "newest"), [(0, 1), (3, 2), (1, 1 << 40)])
async def test_a_range_of_versions_that_is_none_is_out_of_bounds(oldest: int, newest: int) -> None:
    core = MetadataCore(new_state(), ManualClock())
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(registration("a")))
    with pytest.raises(MetadataProtocolError, match="protocol"):
        await core.dispatch(
            REGISTER.path, msgspec.msgpack.encode(raw | {"protocol": newest, "oldest_protocol": oldest})
        )


class Sink:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_reset(self) -> None:
        self.seen.append("reset")

    def on_events(self, events: list[m.Event]) -> None:
        self.seen += [event.kind for event in events]


class Played:
    """An event source with these raw batches, then silence; `ended` once all were taken."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self._batches = batches
        self.asked = 0
        self.ended = False

    async def batches(self, epoch: str, from_seq: int):
        self.asked += 1
        for raw in self._batches:
            yield msgspec.msgpack.encode(raw)
        self.ended = True
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        pass


def stream(core: MetadataCore) -> list[dict[str, Any]]:
    return [msgspec.msgpack.decode(msgspec.msgpack.encode(batch)) for batch in core.snapshot()]


async def test_a_subscriber_leaves_events_and_fields_of_a_newer_server_out_and_keeps_the_order() -> None:
    batches = with_later_fields(stream(MetadataCore(some_state(), ManualClock())))
    seq = batches[-1]["next_seq"]
    later = {"seq": seq, "kind": "moved", "node_id": "a", "to": "b"}
    known = {"seq": seq + 1, "kind": "removed", "node_id": "a"}
    batches.append({"epoch": batches[0]["epoch"], "next_seq": seq + 2, "events": [later, known]})
    sink, source = Sink(), Played(batches)
    subscription = IndexSubscription(source, sink, SystemClock())
    following = asyncio.create_task(subscription.run())
    await until(lambda: source.ended)
    assert sink.seen == ["reset", m.EventKind.NODE_UP, m.EventKind.STORED, m.EventKind.REMOVED]
    assert (subscription.unknown_events, subscription.gaps, subscription.connected) == (1, 0, True)
    await end(following)


async def test_the_first_batch_of_every_stream_says_what_the_server_speaks() -> None:
    core = MetadataCore(some_state(VERSION_2), ManualClock())
    for epoch, position in (("", 0), (core.state.epoch, core.state.log.next_seq)):
        events = core.events(epoch, position)
        first = msgspec.msgpack.decode(await anext(events), type=m.EventBatch)
        assert first.spoken == VERSION_2
        await events.aclose()


async def test_a_stream_of_versions_that_the_subscriber_does_not_speak_is_not_applied() -> None:
    batches = stream(MetadataCore(some_state(), ManualClock()))
    batches[0] |= {"protocol": SPOKEN.newest + 2, "oldest_protocol": SPOKEN.newest + 1}
    sink, source = Sink(), Played(batches)
    subscription = IndexSubscription(source, sink, SystemClock())
    following = asyncio.create_task(subscription.run())
    await until(lambda: source.asked > 1)
    assert sink.seen == [] and not subscription.connected
    await end(following)


def test_every_call_is_tried_here() -> None:
    assert requests(some_state()).keys() == ROWS.keys() and WAIT.waits
