"""The client's pause after failures, and a subscription over streams that break, lie and fall behind."""

import asyncio

import msgspec
import pytest
from support.metadata_rigs import DirectEventSource, end, until
from support.metadata_words import TTL_S, keys, new_state, put, registration

from kvcore.clock import ManualClock, SystemClock
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError, OverloadedError
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.http_transport import HttpMetadataTransport
from metadata_server.limits import ServerLimits
from metadata_server.messages import (
    Event,
    EventBatch,
    EventKind,
    HeartbeatReply,
    HeartbeatRequest,
    MatchReply,
    MatchRequest,
    WaitRequest,
)
from metadata_server.subscription import IndexSubscription

BEAT = HeartbeatRequest(node_id="a", incarnation=1)
OK = msgspec.msgpack.encode(HeartbeatReply(epoch="e", known=True))


class Scripted:
    """A transport that answers what it is told to."""

    def __init__(self):
        self.answer, self.calls, self.gate, self.limits = OK, 0, None, []

    async def call(self, path, body, timeout_s):
        self.calls += 1
        self.limits.append(timeout_s)
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def aclose(self):
        pass


@pytest.fixture
def transport():
    return Scripted()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def client(transport, clock):
    return MetadataClient(transport, clock, 2.0)


async def fails(client):
    with pytest.raises(MetadataUnavailableError):
        await client.heartbeat(BEAT)


async def test_after_a_failure_nothing_is_tried_for_a_growing_pause(client, transport, clock):
    transport.answer = MetadataUnavailableError("down")
    for pause_s in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        calls = transport.calls
        await fails(client)
        assert transport.calls == calls + 1
        clock.advance(pause_s - 0.01)
        assert not client.available
        await fails(client)
        assert transport.calls == calls + 1
        clock.advance(0.02)
    transport.answer = OK
    assert (await client.heartbeat(BEAT)).known
    assert client.available


async def test_one_call_at_a_time_probes_a_server_that_failed(client, transport, clock):
    transport.answer = MetadataUnavailableError("down")
    await fails(client)
    clock.advance(0.2)
    transport.answer, transport.gate = OK, asyncio.Event()
    probe = asyncio.create_task(client.heartbeat(BEAT))
    await until(lambda: transport.calls == 2)
    await fails(client)
    assert transport.calls == 2
    transport.gate.set()
    assert (await probe).known and (await client.heartbeat(BEAT)).known


async def test_a_long_poll_that_probes_holds_the_others_up_for_one_deadline_only(client, transport, clock):
    transport.answer = MetadataUnavailableError("down")
    await fails(client)
    clock.advance(0.2)
    transport.answer, transport.gate = OK, asyncio.Event()
    probe = asyncio.create_task(client.wait(WaitRequest(keys=keys(1), timeout_s=60.0)))
    await until(lambda: transport.calls == 2)
    await fails(client)
    clock.advance(2.0)
    transport.gate, waited = None, transport.gate
    assert (await client.heartbeat(BEAT)).known
    await end(probe)
    waited.set()
    assert client.available


async def test_a_call_may_shorten_the_deadline_but_not_lengthen_it(client, transport):
    poll = WaitRequest(keys=keys(1), timeout_s=60.0)
    transport.answer = msgspec.msgpack.encode(MatchReply(replicas=[]))
    for timeout_s in (None, 30.0, 0.5):
        await client.match(MatchRequest(keys=keys(1)), timeout_s=timeout_s)
        await client.wait(poll, timeout_s=timeout_s)
    assert transport.limits == pytest.approx([0.8, 60.8, 0.8, 60.8, 0.5, 60.5], abs=0.001)


async def test_a_cancelled_probe_lets_the_next_call_probe(client, transport, clock):
    transport.answer = MetadataUnavailableError("down")
    await fails(client)
    clock.advance(0.2)
    transport.answer, transport.gate = OK, asyncio.Event()
    probe = asyncio.create_task(client.heartbeat(BEAT))
    await until(lambda: transport.calls == 2)
    await end(probe)
    transport.gate = None
    assert (await client.heartbeat(BEAT)).known


async def test_a_refusal_is_an_answer_and_a_malformed_reply_a_protocol_error(client, transport):
    transport.answer = MetadataProtocolError("no")
    with pytest.raises(MetadataProtocolError):
        await client.heartbeat(BEAT)
    assert client.available
    for reply in (b"", b"\xc1", OK[:-1], msgspec.msgpack.encode({"epoch": 1})):
        transport.answer = reply
        with pytest.raises(MetadataProtocolError, match="heartbeat"):
            await client.heartbeat(BEAT)


async def test_a_refused_connection_and_a_silent_server_are_unavailable():
    async def silent(reader, writer):
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    transport = HttpMetadataTransport(url)
    with pytest.raises(MetadataUnavailableError, match=r"within 0\.05 s"):
        await transport.call("/v1/nodes", b"", 0.05)
    server.close()
    await transport.aclose()
    transport = HttpMetadataTransport(url)
    with pytest.raises(MetadataUnavailableError):
        await transport.call("/v1/nodes", b"", 5.0)
    await transport.aclose()
    await transport.aclose()


# --- bounds of the core ------------------------------------------------------------------------------------------


async def test_waiters_and_subscribers_are_bounded():
    core = MetadataCore(new_state(), SystemClock(), ServerLimits(max_waiters=1, max_subscribers=1))
    body = msgspec.msgpack.encode(WaitRequest(keys=keys(1), timeout_s=30.0))
    waiting = asyncio.create_task(core.dispatch("/v1/objects/wait", body))
    await until(lambda: core.num_waiters == 1)
    async with asyncio.timeout(5):  # one more is answered at once with what there is: no error, which would be taken
        reply = await core.dispatch("/v1/objects/wait", body)  # for a server in trouble by all that its caller asks
    assert msgspec.msgpack.decode(reply, type=MatchReply).replicas == [] and core.state.counters["waits_cut"] == 1
    stream = core.events("", 0)
    await anext(stream)
    with pytest.raises(OverloadedError):
        await anext(core.events("", 0))
    await stream.aclose()
    await end(waiting)
    assert (core.num_waiters, core.num_subscribers) == (0, 0)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81", b"{}", b"\x80" * 3, b"\x93" * 100_000])
async def test_malformed_bodies_are_refused_in_both_formats(body):
    core = MetadataCore(new_state(), SystemClock())
    for json in (False, True):
        with pytest.raises(MetadataProtocolError):
            await core.dispatch("/v1/objects/match", body, json=json)
    with pytest.raises(MetadataProtocolError, match="no such endpoint"):
        await core.dispatch("/v1/nowhere", body)


async def test_every_truncation_of_a_request_is_refused():
    core = MetadataCore(new_state(), SystemClock())
    body = msgspec.msgpack.encode(registration("a"))
    for size in range(len(body)):
        with pytest.raises(MetadataProtocolError):
            await core.dispatch("/v1/nodes/register", body[:size])
    assert core.state.nodes(0.0).nodes == []


async def test_the_ticking_task_ends_a_lease_without_being_asked():
    clock = SystemClock()
    core = MetadataCore(new_state(), clock)
    ticking = asyncio.create_task(core.run())
    await asyncio.sleep(0)
    body = msgspec.msgpack.encode(registration("a", ttl_s=0.03))
    await core.dispatch("/v1/nodes/register", body)
    await until(lambda: core.state.counters["nodes_expired"] == 1)
    await end(ticking)


async def test_a_server_that_stood_still_does_not_take_its_nodes_for_dead():
    """Stopped for half a minute (a debugger, a machine that was moved): what the nodes said meanwhile is unread yet."""
    clock = ManualClock()
    core = MetadataCore(new_state(), clock)
    ticking = asyncio.create_task(core.run())
    await core.dispatch("/v1/nodes/register", msgspec.msgpack.encode(registration("a")))
    put(core.state, "a", [1], clock.now())
    await asyncio.sleep(0)
    clock.advance(30.0)
    beat = await core.dispatch("/v1/nodes/heartbeat", msgspec.msgpack.encode(BEAT))
    assert msgspec.msgpack.decode(beat, type=HeartbeatReply).known and core.state.num_objects == 1
    assert core.state.counters["stalls"] == 1
    await end(ticking)
    core.state.tick(clock.now() + TTL_S - 0.1)
    assert core.state.counters["nodes_expired"] == 0
    core.state.tick(clock.now() + TTL_S)
    assert core.state.counters["nodes_expired"] == 1, "one that is silent from here on is dead"


# --- subscriptions -----------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.seen: list = []

    def on_reset(self):
        self.seen.append("reset")

    def on_events(self, events):
        self.seen += [event.seq for event in events]


class Streams:
    """An event source that plays prepared streams, then stays silent."""

    def __init__(self, *streams):
        self.streams, self.asked = list(streams), []

    async def batches(self, epoch, from_seq):
        self.asked.append((epoch, from_seq))
        if not self.streams:
            await asyncio.Event().wait()
        for item in self.streams.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item if isinstance(item, bytes) else msgspec.msgpack.encode(item)

    async def aclose(self):
        pass


def batch(*seqs, next_seq, reset=False, epoch="e"):
    events = [Event(seq=seq, kind=EventKind.REMOVED, node_id="a") for seq in seqs]
    return EventBatch(epoch=epoch, reset=reset, next_seq=next_seq, events=events)


async def follow(*streams):
    """The sink's record and what was asked for, once all streams have been played."""
    sink, source = Recorder(), Streams(*streams)
    subscription = IndexSubscription(source, sink, SystemClock())
    following = asyncio.create_task(subscription.run())
    await until(lambda: len(source.asked) > len(streams))
    await end(following)
    return sink.seen, source.asked, subscription


START = [batch(4, 4, reset=True, next_seq=5), batch(4, next_seq=5), batch(next_seq=5)]


async def test_a_gap_is_never_applied_and_replay_is_asked_from_where_it_began():
    seen, asked, subscription = await follow([*START, batch(5, 6, next_seq=7), batch(8, next_seq=9)])
    assert seen == ["reset", 4, 4, 4, 5, 6] and asked == [("", 0), ("e", 7)]
    assert (subscription.gaps, subscription.connected) == (1, False)


@pytest.mark.parametrize(
    "wrong", [batch(5, 7, next_seq=8), batch(5, next_seq=7), batch(next_seq=6), batch(4, 5, next_seq=6)]
)
async def test_a_batch_that_contradicts_itself_is_a_gap(wrong):
    seen, asked, _ = await follow([*START, wrong])
    assert seen == ["reset", 4, 4, 4] and asked[-1] == ("e", 5)


async def test_half_a_snapshot_is_not_gone_on_from():
    seen, asked, _ = await follow(START[:2], START)
    assert asked[:2] == [("", 0), ("", 0)] and seen == ["reset", 4, 4, 4, "reset", 4, 4, 4]


async def test_another_epoch_without_a_reset_is_refused_and_with_one_followed():
    seen, asked, subscription = await follow(
        [*START, batch(5, next_seq=6, epoch="f")],
        [batch(reset=True, next_seq=1, epoch="f"), batch(next_seq=1, epoch="f")],
    )
    assert seen == ["reset", 4, 4, 4, "reset"] and asked == [("", 0), ("e", 5), ("f", 1)]
    assert subscription.epoch == "f"


@pytest.mark.parametrize("breach", [b"\xc1", MetadataUnavailableError("gone"), MetadataProtocolError("no frame")])
async def test_a_broken_stream_is_taken_up_where_it_broke(breach):
    _, asked, subscription = await follow([*START, batch(5, next_seq=6), breach])
    assert asked == [("", 0), ("e", 6)] and subscription.reconnects == 1


async def test_one_that_fell_out_of_the_ring_gets_the_whole_state_again():
    core = MetadataCore(new_state(event_log=4), SystemClock())
    state, now = core.state, core._clock.now()
    state.register(registration("a", units=64), now)
    stream = core.events("", 0)
    first = [msgspec.msgpack.decode(await anext(stream), type=EventBatch) for _ in range(3)]
    assert [b.reset for b in first] == [True, False, False]
    for number in range(10):
        put(state, "a", [number], now)
    again = msgspec.msgpack.decode(await anext(stream), type=EventBatch)
    assert again.reset and {k for e in again.events for k in e.keys} == set(keys(*range(10)))
    await stream.aclose()


async def test_replay_says_reset_for_what_is_gone():
    core = MetadataCore(new_state(event_log=4), SystemClock())
    now = core._clock.now()
    core.state.register(registration("a", units=64), now)
    for number in range(10):
        put(core.state, "a", [number], now)
    assert core.replay(1).reset and core.replay(1).events == []
    assert [e.seq for e in core.replay(8).events] == [8, 9, 10, 11]
    assert core.replay(99).reset


async def test_a_subscription_survives_the_servers_restart():
    old, new = (MetadataCore(new_state(epoch=epoch), SystemClock()) for epoch in ("e1", "e2"))
    old.state.register(registration("a"), old._clock.now())
    source, sink = DirectEventSource(old), Recorder()
    subscription = IndexSubscription(source, sink, SystemClock())
    following = asyncio.create_task(subscription.run())
    await until(lambda: subscription.connected)
    source.core = None
    old.stop()
    await until(lambda: not subscription.connected)
    assert subscription.epoch == "e1"
    source.core = new
    await until(lambda: subscription.epoch == "e2" and subscription.connected)
    assert sink.seen == ["reset", 1, "reset"]
    await end(following)


# --- a server that hangs -----------------------------------------------------------------------------------------


class Slow(Scripted):
    """Each call takes its time, on the test's clock, or has no answer within its limit."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.takes_s = clock, 0.001
        self.answer = msgspec.msgpack.encode(MatchReply(replicas=[]))

    async def call(self, path, body, timeout_s):
        answer = await super().call(path, body, timeout_s)
        self.clock.advance(min(self.takes_s, timeout_s))
        if self.takes_s > timeout_s:
            raise MetadataUnavailableError("late")
        return answer


@pytest.fixture
def slow(clock):
    return Slow(clock)


@pytest.fixture
def known(slow, clock):
    """A client of it."""
    return MetadataClient(slow, clock, 2.0)


ASK = MatchRequest(keys=keys(1))


async def learn(client, times=8):
    for _ in range(times):
        await client.match(ASK)


async def test_a_request_waits_no_longer_than_it_should_by_what_was_seen(known, slow):
    await learn(known)
    assert slow.limits == pytest.approx([0.8] * 8, abs=0.001), "of a server of which nothing is known"
    await learn(known, 1)
    assert slow.limits[-1] == pytest.approx(0.3), "the floor"
    slow.takes_s = 0.2
    await learn(known, 2)
    assert slow.limits[-1] == pytest.approx(0.8, abs=0.01), "four times what is slow"
    await known.wait(WaitRequest(keys=keys(1), timeout_s=10.0))
    assert slow.limits[-1] == pytest.approx(10.8, abs=0.02)
    await known.match(MatchRequest(keys=[b"x" * 16] * 20_000))
    assert slow.limits[-1] == 2.0, "a long batch takes longer, and never more than the configuration says"


async def test_a_call_that_no_request_waits_for_has_all_its_time(known, slow):
    await learn(known, 9)
    slow.answer = OK
    await known.heartbeat(BEAT)
    assert slow.limits[-1] == 2.0


@pytest.mark.parametrize(("answers", "limit_s"), [(9, 0.3), (0, 0.8)])
async def test_a_server_that_hangs_costs_one_call_its_limit_and_the_others_nothing(
    known, slow, clock, answers, limit_s
):
    """One that nobody has heard of is hardly dearer: a node may start while it hangs."""
    await learn(known, answers)
    slow.takes_s, began, calls, asked = 60.0, clock.now(), slow.calls, 0
    while clock.now() < began + 60.0:
        before = clock.now()
        with pytest.raises(MetadataUnavailableError):
            await known.match(ASK)
        assert clock.now() - before <= limit_s + 0.001
        asked += 1
        clock.advance(0.05)
    probes = slow.calls - calls
    assert asked > 700 and probes <= 60 / 1.2 + 2, (asked, probes)
    slow.takes_s = 0.001
    clock.advance(2.0)
    await known.match(ASK)
    assert known.available


async def test_a_wait_ends_when_the_server_is_found_to_hang(transport, clock):
    client = MetadataClient(transport, clock, 2.0)
    transport.answer, transport.gate = msgspec.msgpack.encode(MatchReply(replicas=[])), asyncio.Event()
    wait = asyncio.create_task(client.wait(WaitRequest(keys=keys(1), timeout_s=60.0)))
    await until(lambda: transport.calls == 1)
    transport.gate, held = None, transport.gate
    transport.answer = MetadataUnavailableError("late")
    clock_was = clock.now()
    client._breaker.failed(transport.answer, clock_was + 2.0, 2.0, 2.0)
    with pytest.raises(MetadataUnavailableError, match="answers nobody"):
        await wait
    held.set()
