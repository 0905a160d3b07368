"""What a router compares in the background: which requests, when, what becomes of chunks that are wrong."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from support.router_fakes import CHUNK_TOKENS, FakeNodes, Rig, expected, two_and_two, until
from support.router_tiers import LIVE, PROMPT, Kept, kept_rig, keys_of, put

from kvcore.clock import SystemClock
from kvcore.config.kv.settings import BlendConfig, KVConfig
from kvcore.errors import EngineError, MetadataUnavailableError
from kvcore.types import NodeInfo, Role, Segment
from metadata_server.messages import ManifestEntry, RegisterRequest, SegmentManifest
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.messages import Moved, Promoted
from router.requests.records import LegRecord
from router.shadow.judging import sources, tolerance, verdict
from router.shadow.limits import ShadowLimits
from router.shadow.reports import BlendReport

ALL = KVConfig(shadow=1.0, blend=BlendConfig(mode="first_k"))
LIMITS = ShadowLimits(poll_s=0.001, waiting=3, patience_s=30.0)
BODY = {"model": "fake-model", "prompt": PROMPT, "max_tokens": 2}


def reply(*distances: float, gaps: list[float] | None = None, cached: int = 6 * CHUNK_TOKENS) -> CompareReply:
    return CompareReply(
        request_id="x",
        token_ids=[1, 2],
        kl=[0.0, 0.0],
        gaps=gaps or [0.0, 0.0],
        cached_tokens=cached,
        distances=list(distances),
    )


@contextlib.asynccontextmanager
async def shadowing(
    kv: KVConfig = ALL, nodes: FakeNodes | None = None, limits: ShadowLimits = LIMITS
) -> AsyncIterator[tuple[Rig, Kept, httpx.AsyncClient]]:
    rig, kept, client = await kept_rig(nodes, shadow=kv.shadow, blend=kv.blend, shadow_limits=limits)
    for node in rig.nodes.nodes:
        node.cached_tokens = 6 * CHUNK_TOKENS
    task = asyncio.create_task(rig.shadow.run())
    try:
        yield rig, kept, client
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await client.aclose()


async def ask(client: httpx.AsyncClient, **more: Any) -> str:
    answer = await client.post("/v1/completions", json=BODY | more)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def compares(rig: Rig) -> list[CompareRequest]:
    return [one for node in rig.nodes.nodes for one in node.compares]


def decoder_of(rig: Rig, request_id: str) -> str:
    record = rig.log.find(request_id)
    assert record is not None and record.route is not None
    return record.route.decoder


def hold(rig: Rig, node: str, keys: list[bytes]) -> None:
    """The node's segment has these, as the metadata server knows."""
    segment = Segment(id=f"{node}.1", node_id=node, size_bytes=1 << 20, host_id="h", addresses={})
    entries = [
        ManifestEntry(key=key, offset=at * 4096, length=4096, generation=1)  # type: ignore[arg-type]
        for at, key in enumerate(keys)
    ]
    info = NodeInfo(id=node, role=Role.DECODER, control_url=f"http://{node}:1", incarnation=1)
    manifest = SegmentManifest(segment=segment, entries=entries)
    rig.metadata.register(RegisterRequest(node=info, segments=[manifest], ttl_s=900), SystemClock().now())


def held(rig: Rig, keys: list[bytes]) -> list[bool]:
    now = SystemClock().now()
    return [bool(rig.metadata.match([key], now).replicas) for key in keys]  # type: ignore[list-item]


async def test_a_request_answered_from_the_cache_is_compared_on_its_own_decoder_and_agrees():
    async with shadowing() as (rig, _, client):
        for node in rig.nodes.nodes:
            node.compared = [reply(1e-6, 2e-6)]
        asked = await ask(client)
        await until(lambda: rig.shadow.counts["exact", "same"] == 1)
        [sent] = rig.nodes[decoder_of(rig, asked)].compares
        assert (
            sent.prompt_token_ids == [*PROMPT, expected(PROMPT, 1)[0]]
            and sent.documents is None
            and 0 < sent.max_distance < 0.2
        )
        assert rig.shadow.problem() is None and not rig.shadow.divergences
        shown = (await client.get("/v1/blend")).json()
        assert shown["comparisons"] == {"exact same": 1} and shown["waiting"] == 0 and shown["exact_shadow"] == 1.0


@pytest.mark.parametrize("kv", [KVConfig(), KVConfig(shadow=0.4)])
async def test_who_is_not_drawn_is_not_compared(kv):
    async with shadowing(kv) as (rig, _, client):
        await ask(client)
        assert not rig.shadow.report().waiting and not compares(rig)


async def test_what_was_not_cached_failed_or_had_its_prompt_scored_is_not_compared():
    async with shadowing() as (rig, _, client):
        await ask(client, prompt_logprobs=1)
        for node in rig.nodes.nodes:
            node.cached_tokens = 0
        await ask(client)
        assert not rig.shadow.report().waiting and not compares(rig)


async def test_a_wrong_chunk_is_named_and_dropped_everywhere_and_looked_for_on_other_engines(caplog):
    async with shadowing() as (rig, kept, client):
        keys = keys_of()
        hold(rig, "p0", keys)
        await put(kept.cloud, keys)
        await put(kept.disks["d1"], keys)
        for node in rig.nodes.nodes:
            node.compared = [reply(1e-6, 0.7, 1e-6, float("inf"), 1e-6, 1e-6)]
        asked = await ask(client)
        await until(lambda: rig.shadow.counts["exact", "diverged"] == 4)
        first = rig.shadow.divergences[-1]
        assert (first.request_id, first.node) == (asked, decoder_of(rig, asked)) and first.replicas == ["p0"]
        assert [(chunk.number, chunk.key) for chunk in first.chunks] == [(at, keys[at].hex()) for at in (1, 3)]
        wrong = [False, True, False, True, False, False]
        assert [not there for there in held(rig, list(keys))] == wrong
        for tier in (kept.cloud, kept.disks["d1"]):
            names = {name.key for name in tier.chunks if name.fingerprint == LIVE}
            assert [key not in names for key in keys] == wrong
        assert {len(node.compares) for node in rig.nodes.nodes} == {1}, "each engine has blocks of its own"
    [line, *_] = [one.getMessage() for one in caplog.records if "cache_divergence" in one.getMessage()]
    assert keys[1].hex() in line and f"id={asked}" in line and "replicas=p0" in line
    assert all(one.levelno == logging.ERROR for one in caplog.records if "cache_divergence" in one.getMessage())
    status = rig.view.own_metrics().decode()
    assert "kvferry_router_wrong_chunks_total 8.0" in status
    assert 'kvferry_router_shadow_total{outcome="diverged",reuse="exact"} 4.0' in status
    assert asked in str(rig.shadow.problem()), "status says it"


async def test_an_answer_that_differs_beyond_ties_is_told_though_no_distance_is():
    async with shadowing() as (rig, _, client):
        for node in rig.nodes.nodes:
            node.compared = [reply(gaps=[0.0, 3.0])]
        await ask(client)
        await until(lambda: rig.shadow.counts["exact", "diverged"] == 4)
        assert rig.shadow.divergences[-1].chunks == [] and rig.shadow.divergences[-1].gap == 3.0
        assert rig.shadow.wrong_chunks == 0


async def test_a_node_that_tells_of_more_chunks_than_the_prompt_has_ends_nothing():
    async with shadowing() as (rig, _, client):
        for node in rig.nodes.nodes:
            node.compared = [reply(*[1e-6] * 50, 0.7)]
        await ask(client)
        await until(lambda: rig.shadow.counts["exact", "diverged"] == 4)
        assert rig.shadow.divergences[-1].chunks == []


async def test_a_metadata_server_that_is_away_is_named_and_the_tiers_are_cleared(monkeypatch):
    async with shadowing() as (rig, kept, client):

        async def away(*_: object) -> bytes:
            raise MetadataUnavailableError("gone")

        monkeypatch.setattr(rig.core, "dispatch", away)
        await put(kept.cloud, keys_of()[:1])
        for node in rig.nodes.nodes:
            node.compared = [reply(1.0)]
        await ask(client)
        await until(lambda: rig.shadow.counts["exact", "diverged"] == 4)
        assert any("segments" in line for line in rig.shadow.divergences[-1].left) and not kept.cloud.chunks


async def test_nothing_is_asked_of_a_node_with_work_and_who_waits_too_long_is_dropped():
    async with shadowing() as (rig, _, client):
        for node in rig.nodes.nodes:
            node.running = 1
        await rig.prober.probe()
        await ask(client)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert rig.shadow.report().waiting == 1 and not compares(rig)
        for node in rig.nodes.nodes:
            node.running, node.compared = 0, [reply(1e-6)]
        await rig.prober.probe()
        await until(lambda: rig.shadow.counts["exact", "same"] == 1)
    async with shadowing(limits=ShadowLimits(poll_s=0.001, patience_s=0.0)) as (rig, _, client):
        await ask(client)
        await until(lambda: rig.shadow.counts["exact", "dropped"] == 1)
        assert not compares(rig)


async def test_an_engine_that_is_overloaded_is_asked_again_later():
    async with shadowing() as (rig, _, client):
        await ask(client)
        await until(lambda: len(compares(rig)) >= 2)
        assert rig.shadow.report().waiting == 1
        for node in rig.nodes.nodes:
            node.compared = [reply(1e-6)]
        await until(lambda: rig.shadow.counts["exact", "same"] == 1)


async def test_the_queue_is_bounded_and_the_oldest_goes():
    async with shadowing() as (rig, _, client):
        for _ in range(5):
            await ask(client)
        report = rig.shadow.report()
        assert report.waiting == 3 and report.comparisons == {"exact dropped": 2}


async def test_a_comparison_that_fails_is_counted_and_the_next_one_is_made(caplog):
    async with shadowing() as (rig, _, client):
        for node in rig.nodes.nodes:
            node.compared = [EngineError("it broke"), reply(1e-6)]
        await ask(client)
        await until(lambda: rig.shadow.counts["exact", "failed"] == 1)
        await ask(client)
        await until(lambda: sum(rig.shadow.counts.values()) == 2)
    assert "it broke" in caplog.text


async def test_what_is_not_reused_any_more_says_nothing():
    async with shadowing() as (rig, _, client):
        for node in rig.nodes.nodes:
            node.compared = [reply(cached=0)]
        await ask(client)
        await until(lambda: rig.shadow.counts["exact", "nothing_reused"] == 1)


# --- orders ---


async def test_a_kind_is_shown_and_turned_on_again_by_a_person(caplog):
    async with shadowing() as (rig, _, client):
        for _ in range(8):
            rig.gate.compared("fake-model", "field", 3.0, 0.1)
        [kind] = (await client.get("/v1/blend")).json()["kinds"]
        assert kind["kind"] == "field" and "8 comparisons" in kind["off"] and kind["since"] > 0
        assert 'kvferry_router_blend_off{kind="field",model="fake-model"} 1.0' in rig.view.own_metrics().decode()
        assert any("field of fake-model" in line for line in (await client.get("/v1/cluster")).json()["problems"])
        refused = await client.post("/v1/blend/on", json={"kinds": ["nobody's"]})
        assert refused.status_code == 400 and "known: field" in refused.json()["error"]["message"]
        turned = await client.post("/v1/blend/on", json={"kinds": ["field"]})
        assert turned.json() == {"kinds": ["field of fake-model"]}
        assert rig.gate.why_off("fake-model", "field") == ""


async def test_nothing_is_turned_on_where_the_cluster_file_says_off():
    async with shadowing(KVConfig()) as (_, _, client):
        refused = await client.post("/v1/blend/on", content=b"")
        assert refused.status_code == 400 and "kv.blend.mode" in refused.json()["error"]["message"]


# --- judging ---


@pytest.mark.parametrize(
    ("dtype", "distance", "gap", "diverged"),
    [
        ("float32", 1e-5, 1e-4, False),
        ("float32", 1e-2, 0.0, True),
        ("float32", 0.0, 0.1, True),
        ("bfloat16", 2e-2, 0.1, False),
        ("bfloat16", 0.5, 0.0, True),
        ("float16", float("nan"), 0.0, True),
        ("float32", 0.0, float("nan"), True),
    ],
)
def test_rounding_is_told_from_what_is_wrong(dtype, distance, gap, diverged):
    from support.router_fakes import spec

    said = verdict(reply(distance, gaps=[gap]), tolerance(spec(dtype=dtype)))
    assert said.diverged is diverged and said.wrong == ([0] if not distance <= 0.1 or distance == 1e-2 else [])


@pytest.mark.parametrize("gap", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("distance", [float("nan"), float("inf"), 1e300])
async def test_what_is_no_number_is_told_as_the_greatest(distance: float, gap: float):
    """JSON has null for it, and whoever reads the report could not."""
    async with shadowing() as (rig, _, client):
        for node in rig.nodes.nodes:
            node.compared = [reply(distance, gaps=[0.0, gap])]
        await ask(client)
        await until(lambda: rig.shadow.counts["exact", "diverged"] >= 1)
        told = msgspec.json.decode((await client.get("/v1/blend")).content, type=BlendReport)
    assert told.divergences[-1].gap == told.divergences[-1].chunks[0].distance == ShadowLimits().most


def test_the_sources_are_what_the_legs_told():
    def moved(direction: str, machine: str, transport: str) -> Moved:
        return Moved(transport=transport, direction=direction, num_bytes=1, seconds=0.1, machine=machine)

    legs = [
        LegRecord(id="1", node="p0", kind="prefill", moved=[moved("put", "", "tcp"), moved("get", "h2", "ucx")]),
        LegRecord(
            id="2",
            node="d0",
            kind="decode",
            moved=[moved("get", "h1", "shm"), moved("get", "h9", "tcp")],
            promoted=[Promoted(tier="disk", node="p1"), Promoted(tier="redis")],
        ),
    ]
    assert sources(legs, "d0", {"h1": "d0, p0"}) == [
        "written over tcp by p0",
        "tier disk of p1",
        "tier redis of d0",
        "read over shm out of the memory of d0, p0",
        "read over tcp out of the memory of a machine that is not known",
    ]


# --- documents ---

DOCUMENTS = KVConfig(blend=BlendConfig(mode="first_k", shadow=1.0))
CHAT = {
    "model": "fake-model",
    "messages": [{"role": "user", "content": "which?"}],
    "documents": ["A text that is named first.", "Another text that comes behind it."],
    "max_tokens": 2,
}


def with_documents() -> FakeNodes:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.takes_documents = True
    return nodes


def far_off(kl: float = 2.0) -> CompareReply:
    return CompareReply(request_id="x", token_ids=[1], kl=[kl], gaps=[0.5], approximate_tokens=20)


async def chat(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def why_computed(rig: Rig, answer: dict[str, Any]) -> str:
    record = rig.log.find(answer["id"])
    assert record is not None and record.documents is not None
    return record.documents.why_computed


async def test_documents_that_cost_too_much_are_computed_until_a_person_says_otherwise(caplog):
    async with shadowing(DOCUMENTS, with_documents()) as (rig, _, client):
        for number in range(1, 9):
            for node in rig.nodes.nodes:
                node.compared = [far_off()]
            assert why_computed(rig, await chat(client)) == ""
            await until(lambda number=number: rig.shadow.counts["documents", "compared"] == number)  # type: ignore[misc]
        assert all(one.documents is not None and one.documents.k == 8 for one in compares(rig))
        answer = await chat(client)
        assert why_computed(rig, answer).startswith("turned off, until `kvferry blend on`: over 8 comparisons")
        assert answer["usage"]["prompt_tokens_details"].get("approximate_tokens", 0) == 0
        assert rig.nodes[decoder_of(rig, answer["id"])].generates[-1].documents is None
        for _ in range(20):
            await chat(client)
        assert len(compares(rig)) == 8 and rig.gate.why_off("fake-model", "field")
        await client.post("/v1/blend/on", content=b"")
        assert why_computed(rig, await chat(client)) == ""
    assert any("blend_off" in one.getMessage() for one in caplog.records if one.levelno == logging.ERROR)


async def test_documents_that_hold_the_limits_stay_on():
    async with shadowing(DOCUMENTS, with_documents()) as (rig, _, client):
        near = CompareReply(request_id="x", token_ids=[1], kl=[0.01], gaps=[0.0], approximate_tokens=20)
        for number in range(1, 13):
            for node in rig.nodes.nodes:
                node.compared = [near]
            await chat(client)
            await until(lambda number=number: rig.shadow.counts["documents", "compared"] == number)  # type: ignore[misc]
        assert rig.gate.problem() is None and rig.gate.report().kinds[0].compared == 12


async def test_documents_that_are_not_there_any_more_say_nothing_of_reuse():
    async with shadowing(DOCUMENTS, with_documents()) as (rig, _, client):
        for node in rig.nodes.nodes:
            node.compared = [CompareReply(request_id="x", token_ids=[1], kl=[5.0], gaps=[5.0])]
        await chat(client)
        await until(lambda: rig.shadow.counts["documents", "nothing_reused"] == 1)
        assert not rig.gate.report().kinds[0].compared


async def test_documents_are_warmed_by_themselves_and_only_where_they_are_reused():
    async with shadowing(DOCUMENTS, with_documents()) as (rig, _, client):
        assert (await client.post("/v1/cache/warm", json=CHAT)).status_code == 200
        [sent] = [one for node in rig.nodes.nodes for one in node.prefills]
        assert sent.documents is not None and len(sent.documents.spans) == 2
        for _ in range(8):
            rig.gate.compared("fake-model", "field", 5.0, 0.0)
        refused = await client.post("/v1/cache/warm", json=CHAT)
        assert refused.status_code == 400 and "until `kvferry blend on`" in refused.json()["error"]["message"]
    async with shadowing(KVConfig(), with_documents()) as (_, _, client):
        refused = await client.post("/v1/cache/warm", json=CHAT)
        assert refused.status_code == 400 and "kv.blend.mode is off" in refused.json()["error"]["message"]
    async with shadowing(DOCUMENTS) as (_, _, client):
        refused = await client.post("/v1/cache/warm", json=CHAT)
        assert refused.status_code == 400 and "knows no documents" in refused.json()["error"]["message"]
