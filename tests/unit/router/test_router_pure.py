"""Index, policies, breaker, cluster events, chat templates."""

import json
import random
import re
from pathlib import Path

import msgspec
import pytest
from support.router_fakes import FakeNode, FakeNodes, cluster_config, spec, two_and_two
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from kvcore import model_folder as folders
from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.clock import ManualClock
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvcore.errors import InvalidRequestError, ModelLoadError, NodeUnavailableError
from kvcore.types import ChunkKey, NodeInfo, Role
from metadata_server.messages import Event, EventKind
from router.nodes import health
from router.nodes.cluster import Cluster
from router.nodes.health import BREAKER_TRANSITIONS, Breaker, BreakerState
from router.nodes.limits import NodeHealthLimits
from router.nodes.prober import Prober
from router.requests.spec import ChatPrompt
from router.routing.decision import MAX_EXPLAINED, Candidate
from router.routing.index import KeptKeys, PrefixHits, PrefixIndex
from router.routing.policies import prefix_aware, round_robin
from router.routing.policy import Filter, Policy, RoutePolicy, Rules
from router.routing.views import ClusterView, LeftOut, NodeView, RouteRequest
from router.text.tokenizer import FolderTokenizer, make_tokenizer

KEYS = [ChunkKey(bytes([i]) * 16) for i in range(8)]
F = b"f" * 16
PAUSE_S = NodeHealthLimits().first_pause_s


def node(name: str, role: Role, *, fingerprint: bytes = F, sequences: int = 0, prefill_tokens: int = 0) -> NodeView:
    return NodeView(name, role, fingerprint, 100, 4096, sequences, prefill_tokens)


def view(*nodes: NodeView) -> ClusterView:
    prefillers = tuple(n for n in nodes if n.role is Role.PREFILLER)
    return ClusterView(prefillers, tuple(n for n in nodes if n.role is Role.DECODER))


P0, P1 = node("p0", Role.PREFILLER), node("p1", Role.PREFILLER)
D0, D1 = node("d0", Role.DECODER), node("d1", Role.DECODER)
AWARE, ROBIN = prefix_aware.make(), round_robin.make()


def test_the_index_agrees_with_sets() -> None:
    dice, index = random.Random(1), PrefixIndex()
    truth: dict[tuple[str, str], set[ChunkKey]] = {}
    for _ in range(3000):
        slot = (dice.choice("abc"), dice.choice("xy"))
        keys = dice.sample(KEYS, 3)
        match dice.randrange(20):
            case 0:
                index.drop_node(slot[0])
                truth = {other: held for other, held in truth.items() if other[0] != slot[0]}
            case n if n < 9:
                index.remove(slot[0], keys, slot[1])
                truth.setdefault(slot, set()).difference_update(keys)
            case _:
                index.store(slot[0], keys, slot[1])
                truth.setdefault(slot, set()).update(keys)
        by_node: dict[str, int] = {}
        for (name, _), held in truth.items():
            lead = next((i for i, key in enumerate(KEYS) if key not in held), len(KEYS))
            by_node[name] = max(by_node.get(name, 0), lead)
        everything = set().union(*truth.values())
        longest = next((i for i, key in enumerate(KEYS) if key not in everything), len(KEYS))
        assert index.find(KEYS) == PrefixHits(longest, {name: lead for name, lead in by_node.items() if lead})
        assert len(index) >= len(everything) and bool(index) >= bool(everything)
        index.sweep()
    for _ in range(2 * 256):  # a pass that is under way, and one for those that died since it began
        index.sweep()
    assert len(index) == len(everything)
    assert index._alive == -1, "every bit may be given again"
    index.reset()
    assert index.find(KEYS) == PrefixHits() and not index


def test_a_death_touches_no_key_and_each_later_change_clears_one_table() -> None:
    index = PrefixIndex()
    keys = [ChunkKey(bytes([at]) * 16) for at in range(256)]
    index.store("a", keys, "a.1")
    index.store("b", keys[:1], "b.1")
    tables = list(index._tables)
    index.drop_node("a")
    assert all(now is before for now, before in zip(index._tables, tables, strict=True))
    assert index.find(keys) == PrefixHits(1, {"b": 1}) and len(index) == 256
    for count in range(1, 257):
        index.store("b", [], "b.1")
        changed = sum(now is not before for now, before in zip(index._tables, tables, strict=True))
        assert changed == count
    assert len(index) == 1
    index.store("c", keys[:2], "c.1")
    assert index._bits["c", "c.1"] == 1, "the bit of the dead one is given again, once it is nowhere"
    assert index.find(keys) == PrefixHits(2, {"b": 1, "c": 2})


def test_a_node_that_comes_back_while_its_bits_are_cleared_keeps_what_it_tells() -> None:
    index = PrefixIndex()
    index.store("a", KEYS, "a.1")
    index.drop_node("a")
    for _ in range(100):
        index.sweep()
    index.store("a", KEYS[:2], "a.2")
    index.drop_node("a")
    index.store("a", KEYS[:3], "a.3")
    for _ in range(3 * 256):
        index.sweep()
    assert index.find(KEYS) == PrefixHits(3, {"a": 3}) and len(index) == 3


def test_masks_stay_bounded_however_many_segments_there_are() -> None:
    index = PrefixIndex(max_segments=4)
    for number in range(6):
        index.store(f"n{number}", KEYS[:1], f"n{number}.1")
    assert index.find(KEYS).by_node == {f"n{number}": 1 for number in range(4)}
    index.remove("n5", KEYS[:1], "n5.1")
    index.drop_node("n1")
    index.store("n6", KEYS[:1], "n6.1")  # the dead one's bit is still in the keys
    assert index.find(KEYS).by_node == {f"n{number}": 1 for number in (0, 2, 3)}
    for _ in range(256):
        index.sweep()
    index.store("n7", KEYS[:1], "n7.1")
    assert index.find(KEYS).by_node == {f"n{number}": 1 for number in (0, 2, 3, 7)}
    assert max(mask for table in index._tables for mask in table.values()) < 1 << 4


@pytest.mark.parametrize("policy", [AWARE, ROBIN], ids=["prefix_aware", "round_robin"])
def test_no_route_is_better_than_a_wrong_one(policy: RoutePolicy) -> None:
    assert policy.choose(RouteRequest(500, 64), view()).route is None
    assert policy.choose(RouteRequest(5000, 64), view(P0, D0)).route is None
    assert policy.choose(RouteRequest(500, 64, exclude=frozenset(["d0", "p0"])), view(P0, D0)).route is None
    foreign = node("p9", Role.PREFILLER, fingerprint=b"g" * 16)
    route = policy.choose(RouteRequest(500, 64), view(foreign, D0)).route
    assert route is not None and (route.prefiller, route.reason) == (None, "other_kv")


@pytest.mark.parametrize(
    ("prompt", "chunks", "prefiller", "reason"),
    [
        (100, 0, None, "no_full_chunk"),
        (101, 0, "p0", "no_prefix"),
        (501, 5, None, "all_chunks_cached"),
        (501, 2, "p0", "prefix_hit"),
    ],
)
def test_a_prefiller_only_where_it_has_something_to_do(
    prompt: int, chunks: int, prefiller: str | None, reason: str
) -> None:
    route = AWARE.choose(RouteRequest(prompt, 64, hits={F: PrefixHits(chunks, {})}), view(P0, D0)).route
    assert route is not None and (route.prefiller, route.reason) == (prefiller, reason)
    assert route.expected_cached_tokens == chunks * 100


def test_a_short_rest_is_left_to_the_decoder() -> None:
    route = AWARE.choose(RouteRequest(210, 150, hits={F: PrefixHits(1, {})}), view(P0, D0)).route
    assert route is not None and (route.prefiller, route.reason) == (None, "short_rest")


def test_affinity_until_the_holder_is_too_busy() -> None:
    hits = {F: PrefixHits(8, {"d1": 8})}
    for turn in (0, 1):
        route = AWARE.choose(RouteRequest(1001, 64, turn=turn, hits=hits), view(D0, D1)).route
        assert route is not None and route.decoder == "d1"
    busy = node("d1", Role.DECODER, sequences=10)
    route = AWARE.choose(RouteRequest(1001, 64, hits=hits), view(D0, busy)).route
    assert route is not None and route.decoder == "d0"


def test_the_prefiller_with_less_outstanding_work_is_taken() -> None:
    busy = node("p0", Role.PREFILLER, prefill_tokens=4000)
    for turn in range(3):
        route = AWARE.choose(RouteRequest(1001, 64, turn=turn), view(busy, P1, D0)).route
        assert route is not None and route.prefiller == "p1"


def test_round_robin_takes_each_in_turn() -> None:
    routes = [ROBIN.choose(RouteRequest(1001, 64, turn=turn), view(P0, P1, D0, D1)).route for turn in range(4)]
    assert [(r.prefiller, r.decoder) for r in routes if r] == [("p0", "d0"), ("p1", "d1")] * 2


def test_a_decision_says_what_each_node_scored_and_who_was_left_out_and_why() -> None:
    hits = {F: PrefixHits(5, {"d1": 4, "p0": 5})}
    small = NodeView("d2", Role.DECODER, F, 100, 1000)
    foreign = node("p2", Role.PREFILLER, fingerprint=b"g" * 16)
    seen = view(P0, P1, foreign, node("d0", Role.DECODER, sequences=2), D1, small)
    seen = ClusterView(seen.prefillers, seen.decoders, (LeftOut("d3", Role.DECODER, "draining"),))
    decision = AWARE.choose(RouteRequest(1001, 64, hits=hits, exclude=frozenset(["p1"])), seen)
    others = {"tier_tokens": 0.0, "session": 0.0}
    prefillers = dict.fromkeys(("prefill_tokens", "remote_tokens", "tier_tokens", "handing_over"), 0.0)
    assert decision.candidates() == [
        Candidate("d1", Role.DECODER, 25.0, {"sequences": 0.0, "remote_tokens": 25.0, **others}),
        Candidate("d0", Role.DECODER, 253.0, {"sequences": 128.0, "remote_tokens": 125.0, **others}),
        Candidate("p0", Role.PREFILLER, 0.0, prefillers),
    ]
    assert decision.left_out() == [
        LeftOut("d3", Role.DECODER, "draining"),
        LeftOut("d2", Role.DECODER, "too short a context"),
        LeftOut("p2", Role.PREFILLER, "its KV is not what the decoder reads"),
        LeftOut("p1", Role.PREFILLER, "tried before"),
    ]
    nobody = AWARE.choose(RouteRequest(1001, 64), ClusterView((), (small,), seen.unusable))
    assert nobody.why_no_decoder() == "no node can decode (d3: draining; d2: too short a context)"


def test_an_explanation_is_bounded_and_begins_with_the_chosen_one() -> None:
    seen = ClusterView((), tuple(node(f"d{i:02}", Role.DECODER, sequences=100 - i) for i in range(100)))
    decision = AWARE.choose(RouteRequest(50, 64), seen)
    assert [item.node for item in decision.candidates()] == [f"d{i}" for i in range(99, 99 - MAX_EXPLAINED, -1)]
    by_turn = ROBIN.choose(RouteRequest(50, 64, turn=77), seen)
    assert len(by_turn.candidates()) == MAX_EXPLAINED and by_turn.candidates()[0].node == "d77"


def test_a_preference_that_would_leave_nobody_is_passed_over() -> None:
    idle = Filter("busy", lambda request, nodes, decoder: [node for node in nodes if not node.sequences])
    policy = Policy(decoder=Rules(filters=(idle,)), prefiller=Rules())
    busy = node("d0", Role.DECODER, sequences=1)
    decision = policy.choose(RouteRequest(50, 64), view(busy, D1))
    assert decision.route is not None and decision.route.decoder == "d1"
    assert decision.left_out() == [LeftOut("d0", Role.DECODER, "busy")]
    alone = policy.choose(RouteRequest(50, 64), view(busy))
    assert alone.route is not None and alone.route.decoder == "d0" and alone.left_out() == []


def test_the_breaker_opens_probes_once_and_closes() -> None:
    breaker = Breaker()
    for _ in range(3):
        assert breaker.allows(0.0)
        breaker.failed(0.0)
    assert breaker.state(0.1) is BreakerState.OPEN and not breaker.allows(0.1)
    later = PAUSE_S
    assert breaker.allows(later)
    breaker.started(later)
    assert not breaker.allows(later), "one probe at a time"
    breaker.undecided()
    assert breaker.allows(later), "a cancelled probe frees its place"
    breaker.started(later)
    breaker.failed(later)
    assert not breaker.allows(later + PAUSE_S), "the pause has grown"
    breaker.started(later + 2 * PAUSE_S)
    breaker.succeeded()
    assert breaker.state(later) is BreakerState.CLOSED


def test_legs_of_before_that_fail_late_do_not_keep_a_breaker_open() -> None:
    breaker = Breaker()
    for _ in range(3):
        breaker.failed(0.0)
    breaker.failed(PAUSE_S)
    assert breaker.allows(PAUSE_S), "it was not a probe that failed"


def test_the_breakers_table_is_what_its_prose_says() -> None:
    rows = re.findall(r"^    (closed|open|half_open) +(\w+) +([a-z_ ]+)$", health.__doc__ or "", re.M)
    prose = {(BreakerState(state), event): {BreakerState(a) for a in after.split()} for state, event, after in rows}
    assert prose == BREAKER_TRANSITIONS


def test_a_breaker_keeps_to_its_table_and_reaches_all_of_it() -> None:
    dice, seen = random.Random(7), set()
    breaker, now = Breaker(), 0.0
    for _ in range(5000):
        event = dice.choice(["failed", "failed", "succeeded", "time", "time", "started", "undecided"])
        before = breaker.state(now)
        if event == "time":
            now += dice.choice([0.1, 1.0, 20.0])
        elif event in ("failed", "started"):
            getattr(breaker, event)(now)
        else:
            getattr(breaker, event)()
        after = breaker.state(now)
        if event in ("started", "undecided"):
            assert after is before
        else:
            assert after in BREAKER_TRANSITIONS[before, event]
            seen.add((before, event, after))
    assert seen == {(before, event, after) for (before, event), all_ in BREAKER_TRANSITIONS.items() for after in all_}


async def make_cluster(nodes: FakeNodes) -> tuple[Cluster, Prober]:
    config, clock = cluster_config(nodes.nodes), ManualClock()
    cluster = Cluster(config, clock)
    prober = Prober(config.router, cluster, nodes, clock)
    await prober.probe()
    return cluster, prober


async def test_events_feed_the_index_and_nodes_come_and_go() -> None:
    nodes = two_and_two()
    cluster, prober = await make_cluster(nodes)
    prompt = list(range(50))
    fingerprint = spec().fingerprint
    keys = chunk_keys(root_key(fingerprint), prompt, 16)
    stored = Event(seq=1, kind=EventKind.STORED, node_id="d0", segment_id="d0.1", keys=keys)
    cluster.on_events([stored])
    assert cluster.hits(cluster.view(), prompt, b"") == {fingerprint: PrefixHits(3, {"d0": 3}, machine="h")}
    assert cluster.hits(cluster.view(), prompt, b"other tenant") == {}
    kept: KeptKeys = {(fingerprint, 16): keys[:2]}
    (as_kept,) = cluster.hits(cluster.view(), prompt, b"", kept).values()
    assert as_kept == PrefixHits(2, {"d0": 2}, machine="h")
    nodes.by_url["http://127.0.0.1:9"] = FakeNode("new", Role.DECODER)
    info = NodeInfo(id="new", role=Role.DECODER, control_url="http://127.0.0.1:9", incarnation=1)
    cluster.on_events([Event(seq=2, kind=EventKind.NODE_UP, node_id="new", node=info)])
    await prober.probe()
    assert [n.id for n in cluster.view().decoders] == ["d0", "d1", "new"]
    cluster.on_events([Event(seq=3, kind=EventKind.NODE_DOWN, node_id=name) for name in ("new", "d0")])
    assert [n.id for n in cluster.view().decoders] == ["d0", "d1"], "a static node is judged by its probes"
    assert cluster.hits(cluster.view(), prompt, b"") == {}
    cluster.on_events([stored])
    cluster.on_reset()
    assert len(cluster.index) == 0


async def test_who_came_by_events_and_is_gone_is_forgotten_but_not_before_its_legs_have_ended() -> None:
    nodes = two_and_two()
    cluster, prober = await make_cluster(nodes)
    fake = nodes.by_url["http://127.0.0.1:9"] = FakeNode("new", Role.DECODER)
    info = NodeInfo(id="new", role=Role.DECODER, control_url="http://127.0.0.1:9", incarnation=1)
    cluster.on_events([Event(seq=2, kind=EventKind.NODE_UP, node_id="new", node=info)])
    await prober.probe()
    work = cluster.work_chosen("new", sequences=1, prefill_tokens=0)
    cluster.on_reset()
    await prober.probe()
    assert [n.id for n in cluster.view().decoders] == ["d0", "d1", "new"], "not its own restart"
    fake.down = True
    cluster.on_events([Event(seq=3, kind=EventKind.NODE_DOWN, node_id="new")])
    await prober.probe()
    assert "new" in cluster.nodes and "new" not in [n.id for n in cluster.view().decoders]
    cluster.leg_ended(work)
    await prober.probe()
    assert "new" not in cluster.nodes


async def test_a_restart_forgets_the_breaker_and_a_drain_takes_out() -> None:
    nodes = two_and_two()
    cluster, prober = await make_cluster(nodes)
    for _ in range(3):
        leg = cluster.leg_started(cluster.work_chosen("d0", sequences=1, prefill_tokens=0), sequences=1)
        cluster.leg_ended(leg, error=NodeUnavailableError("x"))
    assert [n.id for n in cluster.view().decoders] == ["d1"]
    nodes["d0"].incarnation += 1
    nodes["d1"].draining = True
    await prober.probe()
    assert [n.id for n in cluster.view().decoders] == ["d0"]
    assert "d1: draining" in cluster.why_no_decoder()


def model_folder(folder: Path, template: str | None) -> Path:
    FastTokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer(model_folder(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(InvalidRequestError):
        tokenizer.render_chat(ChatPrompt([]))


def test_folders_that_cannot_work_are_said_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        FolderTokenizer(tmp_path)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        FolderTokenizer(model_folder(tmp_path, None)).render_chat(ChatPrompt([]))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError):
        FolderTokenizer(tmp_path)


def test_a_tokenizer_comes_from_the_hub_as_the_weights_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path, "{{ messages }}")
    config = msgspec.structs.replace(
        cluster_config([]), engine=TorchEngineConfig(), model=ModelConfig(path="owner/model", name="m")
    )
    monkeypatch.setattr(folders, "_download", lambda hub_id, files: folder)
    tokenizer = make_tokenizer(config)
    assert isinstance(tokenizer, FolderTokenizer) and tokenizer.chat_problem is None
    missing = msgspec.structs.replace(config, model=ModelConfig(path=str(tmp_path / "gone"), name="m"))
    with pytest.raises(ModelLoadError, match=r"does not exist: .*gone\. Correct model\.path"):
        make_tokenizer(missing)
