"""Election over records in memory; what a term begins with; how callers follow. Time is moved by the test."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from support.metadata_rigs import DirectTransport, end, until
from support.metadata_words import key, keys, new_state, registration, reservation
from support.records_rigs import running
from support.server_files import config_with

from kvcore.clock import ManualClock, SystemClock, WakefulClock
from kvcore.config.servers import as_server_at
from kvcore.errors import ConfigError, MetadataUnavailableError, NotLeaderError, RecordsUnavailableError
from kvferry.launch.processes import ProcessKind, plan_processes
from metadata_server.client import MetadataClient
from metadata_server.connect import endpoints_of
from metadata_server.core import MetadataCore
from metadata_server.leading.election import LEADER, Election
from metadata_server.leading.following import FollowingSource, FollowingTransport
from metadata_server.leading.lives import GENERATIONS, by_clock, first_generation, first_generation_alone
from metadata_server.messages import EventBatch, HeartbeatReply, HeartbeatRequest, MatchRequest, WaitRequest
from metadata_server.records.base import Guard, Records
from metadata_server.records.embedded import EmbeddedRecords
from metadata_server.records.memory import memory_records
from metadata_server.subscription import IndexSubscription

LEASE_S = 0.2
"""Of real time: what waits for it waits for an event, never for a time."""


@pytest.fixture
async def records() -> AsyncIterator[EmbeddedRecords]:
    async with running(memory_records(SystemClock())) as records:
        assert isinstance(records, EmbeddedRecords)
        yield records


class Server:
    """An election whose terms are noted."""

    def __init__(self, records: Records, name: str, clock: ManualClock) -> None:
        self.terms: list[int] = []
        self.ended = 0
        self.election = Election(records, clock, f"http://{name}:1", LEASE_S, lead=self._lead, follow=self._follow)

    async def _lead(self, guard: Guard) -> None:
        self.terms.append(guard.revision)

    def _follow(self) -> None:
        self.ended += 1


@asynccontextmanager
async def elected(records: Records, name: str, clock: ManualClock | None = None) -> AsyncIterator[Server]:
    server = Server(records, name, clock or ManualClock())
    task = asyncio.ensure_future(server.election.run())
    try:
        yield server
    finally:
        await end(task)


async def test_the_first_leads_the_other_names_it_and_takes_over_when_it_ends(records):
    async with elected(records, "a") as a:
        await until(lambda: a.election.leads)
        a.election.check()
        async with elected(records, "b") as b:
            await until(lambda: b.election.leader)
            with pytest.raises(NotLeaderError, match="does not lead") as refused:
                b.election.check()
            assert refused.value.leader == "http://a:1" and b.terms == []
            guard = Guard(LEADER, a.election.token)
            await records.put("x", b"1", guard=guard)
            await records.delete(LEADER)  # a hand took it away: who led finds it at its next renewal
            await until(lambda: a.ended and (a.terms[1:] or b.terms))
            with pytest.raises(NotLeaderError):
                await records.put("x", b"late", guard=guard)
            assert max(*a.terms, *b.terms) > a.terms[0]
    assert await records.get(LEADER) is None, "who ends in order gives its lease back"


async def test_a_leader_that_stood_still_past_its_lease_refuses_until_it_has_renewed_it(records):
    clock = ManualClock()
    async with elected(records, "a", clock) as a:
        await until(lambda: a.election.leads)
        token = a.election.token
        clock.advance(LEASE_S)
        with pytest.raises(NotLeaderError, match="has not renewed its lease") as refused:
            a.election.check()
        assert not a.election.leads and refused.value.leader == ""
        await until(lambda: a.election.leads)  # its next renewal tells it that it led all the time
        assert a.election.token == token and a.terms == [token] and not a.ended


async def test_a_leader_whose_lease_has_ended_meanwhile_begins_a_term_of_its_own(records):
    clock = ManualClock()
    async with elected(records, "a", clock) as a:
        await until(lambda: a.election.leads)
        clock.advance(LEASE_S)
        await records.revoke((await records.get(LEADER)).lease)
        await until(lambda: len(a.terms) == 2)
        assert a.terms[1] > a.terms[0] and a.ended == 1


async def test_while_the_records_are_away_a_leader_leads_to_the_end_of_its_lease_and_no_longer(records, monkeypatch):
    clock = ManualClock()
    async with elected(records, "a", clock) as a:
        await until(lambda: a.election.leads)

        async def away(*_: object) -> bool:
            raise RecordsUnavailableError("etcd is away")

        with monkeypatch.context() as patch:
            patch.setattr(records, "renew", away)
            clock.advance(LEASE_S / 2)
            a.election.check()
            clock.advance(LEASE_S / 2)
            with pytest.raises(NotLeaderError):
                a.election.check()
        await until(lambda: a.election.leads)


async def test_who_cannot_make_ready_does_not_answer_and_tries_again(records):
    server = Server(records, "a", ManualClock())
    tried = 0

    async def lead(guard: Guard) -> None:
        nonlocal tried
        tried += 1
        if tried < 3:
            raise RecordsUnavailableError("no")

    server.election._lead = lead
    task = asyncio.ensure_future(server.election.run())
    await until(lambda: tried == 1)
    with pytest.raises(NotLeaderError, match="making ready"):
        server.election.check()
    await until(lambda: server.election.leads)
    assert tried == 3 and "leads, token" in repr(server.election)
    await end(task)


async def test_generations_grow_over_lives_whatever_the_clocks_say(records):
    early, late = ManualClock(1000.0), ManualClock(5000.0)
    first = await first_generation(records, late)
    assert first == by_clock(late)
    second = await first_generation(records, early)
    assert second >= first + (1 << 44)
    assert await first_generation_alone(records, early) > second
    guard = Guard(LEADER, (await records.put(LEADER, b"a")).record.revision)
    await records.delete(LEADER)
    with pytest.raises(NotLeaderError):
        await first_generation(records, late, guard)
    await records.aclose()
    assert await first_generation_alone(records, late) == by_clock(late), "who can write nothing begins all the same"


async def test_the_record_of_generations_may_be_anything(records):
    await records.put(GENERATIONS, b"nonsense")
    assert await first_generation(records, ManualClock()) == by_clock(ManualClock())


# --- a core whose leader may change --------------------------------------------------------------------------------


class Told:
    """Says what a test tells it."""

    def __init__(self) -> None:
        self.leads = True

    def check(self) -> None:
        if not self.leads:
            raise NotLeaderError("not here", leader="http://b:1")


def led_core(token: int = 7) -> tuple[MetadataCore, Told]:
    core, leader = MetadataCore(new_state(), ManualClock()), Told()
    core.leader = leader
    core.begin(new_state(), token=token)
    return core, leader


async def test_grants_have_the_terms_token_and_who_leads_no_longer_gives_none():
    core, leader = led_core()
    client = MetadataClient(DirectTransport(core), SystemClock(), 5.0)
    assert (await client.register(registration("a"))).token == 7
    assert (await client.heartbeat(HeartbeatRequest(node_id="a", incarnation=1))).token == 7
    assert (await client.reserve(reservation("a", [1]))).token == 7 and client.token == 7
    reply = await client.match(MatchRequest(keys=keys(1)))
    assert reply.token == 7
    leader.leads = False
    beat = HeartbeatRequest(node_id="a", incarnation=1)
    for call in (client.stats(), client.reserve(reservation("a", [2])), client.heartbeat(beat)):
        with pytest.raises(NotLeaderError):
            await call
        client._breaker._pause_s = 0.0
    for read in (core.snapshot, lambda: core.replay(1)):
        with pytest.raises(NotLeaderError):
            read()


async def test_a_wait_of_a_term_that_ends_is_refused_and_its_stream_ends():
    core, leader = led_core()
    stream = core.events("", 0)
    first = msgspec.msgpack.decode(await anext(stream), type=EventBatch)
    assert first.reset and first.token == 7
    wait = msgspec.msgpack.encode(WaitRequest(keys=[key(1)], timeout_s=100.0))
    waiting = asyncio.ensure_future(core.dispatch("/v1/objects/wait", wait))
    await until(lambda: core.num_waiters == 1)
    leader.leads = False
    core.begin(new_state(epoch="e2"))
    with pytest.raises(NotLeaderError):
        await waiting
    rest = [batch async for batch in stream]
    assert len(rest) <= 2 and core.num_subscribers == 0


async def test_an_answer_of_a_leader_that_was_replaced_is_not_taken():
    old, new = led_core(7)[0], led_core(9)[0]
    transport = DirectTransport(new)
    client = MetadataClient(transport, SystemClock(), 5.0)
    await client.register(registration("a"))
    transport.core = old
    with pytest.raises(MetadataUnavailableError, match="replaced"):
        await client.register(registration("a"))
    transport.core = led_core(0)[0]
    assert (await client.register(registration("a"))).token == 0, "a cluster that has one server again"


async def test_the_stream_of_a_leader_that_was_replaced_is_not_followed():
    class Source:
        def __init__(self) -> None:
            self.tokens = [9, 7, 9]
            self.asked = 0

        async def batches(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
            self.asked += 1
            token = self.tokens[min(self.asked, 3) - 1]
            yield msgspec.msgpack.encode(EventBatch(epoch=f"of {token}", reset=True, next_seq=1, token=token))

        async def aclose(self) -> None:
            """Nothing is held."""

    class Sink:
        resets = 0

        def on_reset(self) -> None:
            self.resets += 1

        def on_events(self, events: object) -> None:
            """None come."""

    source, sink = Source(), Sink()
    subscription = IndexSubscription(source, sink, SystemClock())
    task = asyncio.ensure_future(subscription.run())
    await until(lambda: source.asked == 3 and sink.resets == 2)
    await end(task)


# --- following -----------------------------------------------------------------------------------------------------


class Way:
    """To one server of a made-up world, in which `leads` names who leads and `down` who does not answer."""

    def __init__(self, world: "World", url: str) -> None:
        self._world, self._url = world, url

    def _refuse(self) -> None:
        world = self._world
        world.asked.append(self._url)
        if self._url in world.down:
            raise MetadataUnavailableError("down")
        if self._url != world.leads:
            raise NotLeaderError("not here", leader=world.believed.get(self._url, world.leads))

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        self._refuse()
        return msgspec.msgpack.encode(HeartbeatReply(epoch=self._url, known=True))

    async def batches(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
        self._refuse()
        yield self._url.encode()

    async def aclose(self) -> None:
        self._world.closed.append(self._url)


class World:
    def __init__(self) -> None:
        self.leads = "a"
        self.believed: dict[str, str] = {}
        self.down: set[str] = set()
        self.asked: list[str] = []
        self.closed: list[str] = []


async def test_a_call_follows_to_the_leader_in_one_round_trip_and_remembers_it():
    world = World()
    world.leads = "b"
    transport = FollowingTransport(["a", "b", "c"], lambda url: Way(world, url))
    await transport.call("/", b"", 1.0)
    await transport.call("/", b"", 1.0)
    assert world.asked == ["a", "b", "b"]
    await transport.aclose()
    assert sorted(world.closed) == ["a", "b"]


async def test_a_server_that_fails_is_followed_by_the_next_and_nothing_is_asked_twice():
    world = World()
    transport = FollowingTransport(["a", "b", "c"], lambda url: Way(world, url))
    world.down, world.leads = {"a"}, ""
    for _ in range(4):
        with pytest.raises(MetadataUnavailableError):
            await transport.call("/", b"", 1.0)
    assert world.asked == ["a", "b", "c", "a"]
    world.leads = "c"
    await transport.call("/", b"", 1.0)
    assert world.asked[4:] == ["b", "c"]


async def test_who_is_sent_to_a_stranger_or_back_does_not_go():
    world = World()
    world.leads, world.believed = "", {"a": "http://elsewhere", "b": "a"}
    transport = FollowingTransport(["a", "b"], lambda url: Way(world, url))
    with pytest.raises(NotLeaderError):
        await transport.call("/", b"", 1.0)
    with pytest.raises(NotLeaderError):  # `b` believes that `a` leads, and `a` knows better
        await transport.call("/", b"", 1.0)
    assert world.asked == ["a", "b", "a"]


async def test_a_stream_follows_too():
    world = World()
    world.leads = "b"
    source = FollowingSource(["a", "b"], lambda url: Way(world, url))
    assert [batch async for batch in source.batches("", 0)] == [b"b"]
    world.down = {"b"}
    with pytest.raises(MetadataUnavailableError):
        await anext(source.batches("", 0))
    world.down, world.leads = set(), "a"
    assert [batch async for batch in source.batches("", 0)] == [b"a"]
    assert world.asked == ["a", "b", "b", "a"]
    await source.aclose()


def test_the_clock_of_leases_goes_on():
    clock = WakefulClock()
    first = clock.now()
    assert clock.now() >= first > 0


# --- what a cluster file says of them ------------------------------------------------------------------------------


ETCD = {"kind": "etcd", "endpoints": ["http://127.0.0.1:2379"]}


def test_each_server_of_a_file_is_started_where_it_is_and_all_know_all(tmp_path):
    config = config_with(tmp_path, records=ETCD, port=8700, standbys=["127.0.0.1:8701", "[::1]:8702"])
    urls = ("http://127.0.0.1:8700", "http://127.0.0.1:8701", "http://[::1]:8702")
    assert endpoints_of(config.metadata_server).urls == urls
    plans = [plan for plan in plan_processes(config, tmp_path / "c") if plan.kind is ProcessKind.METADATA_SERVER]
    assert [(plan.name, plan.url) for plan in plans] == list(
        zip(["metadata-server", "metadata-server-2", "metadata-server-3"], urls, strict=True)
    )
    assert plans[1].command[-2:] == ("--at", "127.0.0.1:8701") and "--at" not in plans[0].command
    second = as_server_at(config, "127.0.0.1:8701")
    assert endpoints_of(second.metadata_server).urls == (urls[1], urls[0], urls[2])
    assert endpoints_of(as_server_at(config, "[::1]:8702").metadata_server).urls[0] == urls[2]
    with pytest.raises(ConfigError, match=r"--at 127\.0\.0\.1:9: the file's metadata servers are"):
        as_server_at(config, "127.0.0.1:9")


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"standbys": ["127.0.0.1:8701"]}, r"set records: \{kind: etcd\}"),
        ({"standbys": ["nowhere"], "records": ETCD}, "nowhere: expected HOST:PORT"),
        ({"standbys": ["http://a:1"], "records": ETCD}, "expected HOST:PORT"),
        ({"standbys": ["127.0.0.1:8700"], "records": ETCD}, "8700 on 127.0.0.1 is metadata_server.port already"),
    ],
)
def test_what_a_file_may_not_say_of_standbys(tmp_path, server, said):
    with pytest.raises(ConfigError, match=said):
        config_with(tmp_path, **server)
