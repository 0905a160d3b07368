"""Clients may ask the cache to keep a prompt: it is shown what became of it, and they cannot take more than a share."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.router_fakes import Rig, make_rig, two_and_two

from kvcore.chunk_keys import chunk_keys, rank_key, root_key
from kvcore.clock import ManualClock
from kvcore.config.hit_rate import HitRateConfig
from kvcore.config.schema import RouterConfig, StoreConfig
from kvcore.errors import ContextLengthError, MetadataUnavailableError
from kvcore.types import ChunkKey
from metadata_server.cache_messages import CacheReply
from nodeapi.sampling import SamplingParams
from router.api.fields.cache_hints import CacheHintFields, MarkedForCache, hints_of
from router.cache.hints import HintPins, PinRoom
from router.cache.limits import HintLimits
from router.requests.hints import CacheHint
from router.requests.spec import RequestSpec

ASK: dict[str, Any] = {"prompt": "hello " * 20, "max_tokens": 2, "temperature": 0}
HOUR = CacheHint("cache_control", "1h", 3600.0)


@pytest.mark.parametrize(
    ("fields", "hints"),
    [
        ({}, []),
        ({"prompt_cache_retention": "24h"}, [("prompt_cache_retention", "24h", 86400.0)]),
        ({"prompt_cache_retention": "in_memory"}, [("prompt_cache_retention", "in_memory", None)]),
        ({"prompt_cache_retention": 7}, [("prompt_cache_retention", "7", None)]),
        ({"prompt_cache_key": "user-1"}, [("prompt_cache_key", "user-1", None)]),
        ({"prompt_cache_options": {"ttl": "30m"}}, [("prompt_cache_options", "30m", 1800.0)]),
        ({"prompt_cache_options": {"ttl": "0m"}}, [("prompt_cache_options", '{"ttl":"0m"}', None)]),
        ({"cache_control": {"type": "ephemeral"}}, [("cache_control", "5m", 300.0)]),
        ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, [("cache_control", "1h", 3600.0)]),
        (
            {"cache_control": {"type": "ephemeral", "ttl": ["1h"]}},
            [("cache_control", '{"type":"ephemeral","ttl":["1h"]}', None)],
        ),
        (
            {"cache_control": {"type": "lasting", "ttl": "1h"}},
            [("cache_control", '{"type":"lasting","ttl":"1h"}', None)],
        ),
        ({"cache_control": "x" * 100}, [("cache_control", "x" * 63 + "…", None)]),
    ],
)
def test_fields_are_read_as_hints(fields: dict[str, object], hints: list[tuple[str, str, float | None]]) -> None:
    found = hints_of(CacheHintFields(**fields))
    assert [(hint.name, hint.asked, hint.keep_s) for hint in found] == hints
    assert all(hint.note or hint.keep_s for hint in found), "what asks for nothing says why"


def test_marks_of_messages_count_once_and_are_bounded() -> None:
    marks = [MarkedForCache({"type": "ephemeral"}, {"mode": "explicit"}), MarkedForCache({"type": "ephemeral"})]
    found = hints_of(CacheHintFields(), marks)
    assert [hint.name for hint in found] == ["cache_control", "prompt_cache_breakpoint"]
    assert len(hints_of(CacheHintFields(), [MarkedForCache(str(number)) for number in range(50)])) == 8


class FakeStore:
    """Pins all it is told, or fails."""

    def __init__(self) -> None:
        self.pinned: list[tuple[list[ChunkKey], float | None]] = []
        self.error: MetadataUnavailableError | None = None
        self.room = 1000

    async def pin(self, keys: Sequence[ChunkKey], ttl_s: float | None = None, *, extend: bool = False) -> CacheReply:
        assert extend, "no client may shorten a pin"
        if self.error is not None:
            raise self.error
        self.pinned.append((list(keys), ttl_s))
        done = min(self.room, len(keys))
        return CacheReply(known=0, done=done, refused=len(keys) - done)


class Hinted:
    """A rig whose requests have hints."""

    def __init__(self, rig: Rig, store: FakeStore | None, limits: HintLimits) -> None:
        self.rig, self.store, self.clock = rig, store, ManualClock()
        self.pins = HintPins(
            rig.cluster, rig.log, self.clock, rig.config, rig.services.control, store=store, limits=limits
        )

    async def ask(self, tokens: int, salt: bytes = b"", hint: CacheHint = HOUR, seed: int = 1) -> tuple[bool, str]:
        prompt = [(seed * 31 + number * 7) % 500 for number in range(tokens)]
        spec = RequestSpec(f"r{seed}", prompt, SamplingParams(max_tokens=1), cache_salt=salt, hints=[hint])
        run = self.rig.dispatcher.open(spec)
        async with run:
            assert [emit async for emit in run]
        await self.rig.services.control.aclose(5.0)
        (told,) = run.record.hints
        return told.applied, told.why


async def hinted(
    *, on: bool = True, limits: HintLimits = HintLimits(), store: FakeStore | None = None, **spec: Any
) -> Hinted:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.spec, node.segment_bytes = spec, 64 << 10
    rig = await make_rig(nodes, cache=HitRateConfig(hints=on))
    return Hinted(rig, store, limits)


async def test_a_prompt_is_pinned_for_the_time_that_was_asked_for_up_to_the_longest() -> None:
    store = FakeStore()
    subject = await hinted(store=store)
    assert await subject.ask(100) == (True, "6 of 6 chunks are kept for 3600 s")
    (keys, ttl_s), spec = store.pinned[0], subject.rig.nodes["d0"].kv_spec("w1")
    prompt = [(31 + number * 7) % 500 for number in range(100)]
    assert (keys, ttl_s) == (chunk_keys(root_key(spec.fingerprint), prompt, 16), 3600.0)
    assert await subject.ask(100, hint=CacheHint("x", "24h", 86400.0)) == (True, "6 of 6 chunks are kept for 3600 s")
    assert await subject.ask(100, hint=CacheHint("x", "5m", 300.0)) == (True, "6 of 6 chunks are kept for 300 s")
    assert await subject.ask(10) == (False, "the prompt fills no chunk")


async def test_every_rank_of_a_chunk_is_pinned() -> None:
    store = FakeStore()
    subject = await hinted(store=store, tp_size=2)
    assert await subject.ask(40) == (True, "2 of 2 chunks are kept for 3600 s")
    first, second = store.pinned[0][0][::2]
    assert store.pinned[0][0] == [first, rank_key(first, 1), second, rank_key(second, 1)]


async def test_nothing_is_pinned_where_it_is_off_or_cannot_be() -> None:
    store = FakeStore()
    off = await hinted(on=False, store=store)
    assert await off.ask(100) == (False, "router.cache.hints is off: chunks stay as long as there is room")
    assert await (await hinted()).ask(100) == (False, "there is no store")
    failing = await hinted(store=store)
    store.error = MetadataUnavailableError("not there")
    assert await failing.ask(100) == (False, "the metadata server did not pin: not there")
    assert store.pinned == []
    store.error, store.room = None, 4
    assert await failing.ask(100, seed=2) == (True, "4 of 6 chunks are kept for 3600 s")
    store.room = 0
    assert await failing.ask(100, seed=3) == (False, "0 of 6 chunks are kept for 3600 s")


async def test_clients_hold_a_quarter_of_the_segments_and_one_salt_half_of_that() -> None:
    """Four segments of 64 KiB hold 256 chunks: 64 for clients, of these 32 for one salt."""
    store = FakeStore()
    subject = await hinted(store=store)
    assert await subject.ask(50 * 16) == (True, "32 of 50 chunks are kept for 3600 s")
    assert await subject.ask(160, seed=2) == (False, "clients' pins have their room already")
    assert await subject.ask(320, seed=3, salt=b"other") == (True, "20 of 20 chunks are kept for 3600 s")
    assert await subject.ask(320, seed=4, salt=b"third") == (True, "12 of 20 chunks are kept for 3600 s")
    subject.clock.advance(3600.0)
    assert await subject.ask(160, seed=2) == (True, "10 of 10 chunks are kept for 3600 s")


TAKES = st.lists(
    st.tuples(
        st.integers(0, 9), st.integers(1, 8), st.sampled_from([b"", b"a", b"b"]), st.floats(0, 9), st.floats(0, 3)
    ),
    max_size=30,
)


@given(TAKES, st.integers(1, 12))
def test_the_room_of_clients_is_kept_and_comes_back(
    takes: list[tuple[int, int, bytes, float, float]], most: int
) -> None:
    """Against a plain account of who holds which chunk until when."""
    room, now = PinRoom(0.5), 100.0
    account: dict[ChunkKey, tuple[float, bytes]] = {}
    for first, count, salt, ttl_s, pause in takes:
        now += pause
        keys = [ChunkKey(bytes([number])) for number in range(first, first + count)]
        account = {key: pin for key, pin in account.items() if pin[0] > now}
        expected = 0
        for key in keys:
            until, holder = account.get(key, (0.0, salt))
            own = sum(other == salt for _, other in account.values())
            if key not in account and (len(account) >= most or own >= most / 2):
                break
            account[key] = max(until, now + ttl_s), holder
            expected += 1
        assert list(room.take(keys, salt, now + ttl_s, now, most=most)) == keys[:expected]
        assert len(room) == len(account)
    room.take([], b"", now, now + 100.0, most=most)
    assert len(room) == 0 and not room._by_salt and not room._ends


async def test_the_record_shows_each_hint_and_no_answer_depends_on_any() -> None:
    rig = await make_rig()
    HintPins(rig.cluster, rig.log, rig.services.clock, rig.config, rig.services.control, store=None)
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://router") as client:  # type: ignore[arg-type]
        for path, ask in (("completions", ASK), ("chat/completions", {"messages": messages, "max_tokens": 2})):
            plain = (await client.post(f"/v1/{path}", json={**ask, "seed": 1})).json()
            for value in ("24h", 1, {"type": "ephemeral", "ttl": [None]}, [], None):
                hints = dict.fromkeys(CacheHintFields.__struct_fields__, value)
                reply = await client.post(f"/v1/{path}", json={**ask, "seed": 1, **hints})
                assert reply.status_code == 200, reply.text
                assert (reply.json()["choices"], reply.json()["usage"]) == (plain["choices"], plain["usage"])
        body = {"messages": messages, "max_tokens": 2, "prompt_cache_key": "k", "prompt_cache_retention": "24h"}
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        record = (await client.get(f"/v1/requests/{answer['id']}")).json()
    off = "router.cache.hints is off: chunks stay as long as there is room"
    by_itself = "the cache finds every prompt's beginning by itself"
    assert record["hints"] == [
        {"name": "prompt_cache_key", "asked": "k", "applied": False, "why": by_itself},
        {"name": "prompt_cache_retention", "asked": "24h", "applied": False, "why": off},
        {"name": "cache_control", "asked": "5m", "applied": False, "why": off},
    ]


async def test_a_request_that_failed_pins_nothing() -> None:
    store = FakeStore()
    subject = await hinted(store=store)
    for node in subject.rig.nodes.nodes:
        node.generate_error = ContextLengthError("too long")
    spec = RequestSpec("r", [1] * 100, SamplingParams(max_tokens=1), hints=[HOUR])
    run = subject.rig.dispatcher.open(spec)
    with pytest.raises(ContextLengthError):
        async with run:
            _ = [emit async for emit in run]
    await subject.rig.services.control.aclose(5.0)
    (told,) = run.record.hints
    assert (told.applied, told.why, store.pinned) == (False, "the request was not answered", [])


def test_the_bounds_are_those_that_the_pages_say() -> None:
    config = HitRateConfig()
    assert not config.hints and config.longest_pin_s == 3600.0 and RouterConfig().cache == config
    assert StoreConfig().pin_share * HintLimits().share_of_pins == 0.25, "a quarter, as config.md and hit-rate.md say"
    assert HintLimits().share_of_one_salt == 0.5
