"""What tiers have of a prompt, and what that does to its ways."""

import pytest
from msgspec.structs import replace
from support.router_fakes import CHUNK_TOKENS, make_rig, spec

from kvcore.config.tiers import DiskTierConfig, RedisTierConfig, TiersConfig
from kvcore.types import ChunkKey, Role
from metadata_server.messages import Event, EventKind
from nodeapi.messages import SamplingParams, TierReport
from router.requests.spec import RequestSpec
from router.routing.costs import other_ways, ways
from router.routing.index import PrefixHits
from router.routing.policies import prefix_aware
from router.routing.promotion import PEER, expected, offered
from router.routing.scorers import TIER_TOKENS
from router.routing.tier_index import TierIndex
from router.routing.views import ClusterView, NodeView, RouteRequest, TierRates

KV = spec(chunk_bytes=1 << 20)
"""1 MiB for 16 tokens: 0.8 ms of computing."""
RATE, GB = 20_000.0, 1e9
DISK = TierRates("disk", 2 * GB)
KEYS = [ChunkKey(bytes([number]) * 16) for number in range(20)]


def node(name: str, role: Role = Role.DECODER, tiers: TierRates = DISK, **measured: float) -> NodeView:
    rates = {"prefill_rate": RATE, "step_s": 0.01, "near_rate": 4 * GB, "far_rate": GB} | measured
    return NodeView(name, role, KV.fingerprint, CHUNK_TOKENS, 1 << 20, kv_spec=KV, tiers=tiers, **rates)  # type: ignore[arg-type]


def asked(chunks: int, **hits: object) -> RouteRequest:
    """A prompt of so many chunks and a token."""
    return RouteRequest(chunks * CHUNK_TOKENS + 1, 64, hits={KV.fingerprint: PrefixHits(**hits)})  # type: ignore[arg-type]


ON_D = asked(100, longest=20, by_node={"d": 20}, on_disk={"d": 80}, in_tiers=80)
"""20 chunks lie in d's memory, all others on its disk."""


def test_what_lies_on_disk_is_loaded_from_there_and_then_read_from_memory():
    (way,) = ways(ON_D, node("d"), None)
    assert way.tier == "disk" and way.promote_s == pytest.approx(80 * KV.chunk_bytes / (2 * GB))
    assert way.load_s == pytest.approx(100 * KV.chunk_bytes / (4 * GB)) and way.compute_s == pytest.approx(1 / RATE)
    assert way.expected_s == pytest.approx(way.promote_s + way.load_s + way.compute_s + 0.01)
    (busy,) = ways(ON_D, node("d", prefill_tokens=20_000), None)
    assert busy.expected_s == pytest.approx(1.0 + way.expected_s - way.promote_s), "others are computed meanwhile"


def test_another_node_has_it_by_way_of_the_one_on_whose_disk_it_lies():
    (way,) = ways(replace(ON_D, peer_rate=2 * GB), node("e"), None)
    assert way.tier == PEER and way.load_s == pytest.approx(100 * KV.chunk_bytes / GB)
    assert offered(ON_D, node("e")).near == 0 and offered(ON_D, node("d")).near == 80
    assert ways(ON_D, node("d", tiers=TierRates()), None)[0].tier == "", "a node without tiers asks nobody"


def test_where_computing_is_faster_it_is_computed_and_the_record_has_both():
    slow = node("d", tiers=TierRates("disk", GB / 2))
    assert expected(ON_D, slow).chunks == 0 and offered(ON_D, slow).chunks == 80
    (way,), (other,) = ways(ON_D, slow, None), other_ways(ON_D, slow, None)
    assert (way.tier, other.tier) == ("", "disk") and way.compute_s > 80 * CHUNK_TOKENS / RATE < other.promote_s
    (fast,), (other,) = ways(ON_D, node("d"), None), other_ways(ON_D, node("d"), None)
    assert (fast.tier, other.tier) == ("disk", "") and fast.expected_s < other.expected_s
    found = prefix_aware.make().choose(ON_D, ClusterView((node("p", Role.PREFILLER),), (node("d"),)))
    assert found.route is not None and found.route.expected_promoted_tokens == 80 * CHUNK_TOKENS
    assert [way.tier for way in found.best_ways()] == ["disk", ""]


def test_what_a_prefiller_would_have_computed_sooner_no_decoder_loads():
    slow = node("d", tiers=TierRates("disk", GB / 2), prefill_rate=0.0)
    assert expected(ON_D, slow).chunks == 80, "nothing is known of computing"
    view = ClusterView((node("p", Role.PREFILLER, TierRates("disk", GB / 2)),), (slow,))
    route = prefix_aware.make().choose(ON_D, view).route
    assert route is not None and route.prefiller == "p" and route.expected_cached_tokens == 20 * CHUNK_TOKENS
    assert prefix_aware.make().choose(ON_D, ClusterView(view.prefillers, (node("d"),))).route.prefiller is None  # type: ignore[union-attr]


def test_while_nothing_is_measured_it_is_loaded_and_not_compared():
    new = node("d", tiers=TierRates("disk"))
    assert expected(ON_D, new).chunks == 80 and ways(ON_D, new, None) == ()
    fresh = node("d", prefill_rate=0.0)
    assert ways(ON_D, fresh, None)[0].tier == "disk", "a token is computed in a step, however fast prompts are"


def test_the_node_on_whose_disk_it_lies_is_chosen_unless_it_has_much_to_do():
    def chosen(sequences: int) -> str:
        decoders = (node("c"), replace(node("d"), sequences=sequences), node("e"))
        route = prefix_aware.make().choose(ON_D, ClusterView((), decoders)).route
        assert route is not None
        return route.decoder

    assert chosen(0) == chosen(2) == "d" != chosen(12)


def test_a_disk_counts_by_what_is_measured_of_it_and_a_shared_tier_prefers_nobody():
    nodes = [node("c"), node("d"), node("d2")]
    c, d, d2 = TIER_TOKENS.score(ON_D, nodes, None)
    load_s, computes_s = KV.chunk_bytes / (2 * GB), CHUNK_TOKENS / RATE
    assert d == pytest.approx(80 * CHUNK_TOKENS * load_s / computes_s) and c == d2 > d
    slow = [replace(one, tiers=TierRates("disk", GB / 100)) for one in nodes]
    assert set(TIER_TOKENS.score(ON_D, slow, None)) == {80.0 * CHUNK_TOKENS}, "all would compute"
    shared = asked(100, longest=20, in_shared=80, in_tiers=80)
    assert len(set(TIER_TOKENS.score(shared, nodes, None))) == 1
    other = replace(node("o"), fingerprint=b"other")
    assert TIER_TOKENS.score(ON_D, [other, node("d")], None) == [100.0 * CHUNK_TOKENS, d], "its KV is another kind"


def event(kind: EventKind, node_id: str, keys: list[ChunkKey]) -> Event:
    return Event(seq=1, kind=kind, node_id=node_id, keys=keys)


def test_disks_are_known_by_events_each_partition_by_itself():
    index = TierIndex(TiersConfig(), ("a", "b"))
    assert not index
    whole = index._disks._whole  # type: ignore[union-attr]
    for key, part in zip(KEYS, whole.numbers_of(KEYS), strict=True):
        index.on_event(event(EventKind.ON_DISK, "d", [key]), part)
    found = index.behind(PrefixHits(3, {"e": 3}), KEYS)
    assert (found.longest, found.on_disk, found.in_tiers) == (3, {"d": 17}, 17)
    index.on_event(event(EventKind.OFF_DISK, "d", [KEYS[10]]), whole.number_of(KEYS[10]))
    assert index.behind(PrefixHits(), KEYS).in_tiers == 10
    index.on_event(event(EventKind.ON_DISK, "e", [KEYS[10]]), whole.number_of(KEYS[10]))
    found = index.behind(PrefixHits(), KEYS)
    assert found.on_disk == {"d": 10} and found.in_tiers == 20, "by turns on several disks"
    index.on_event(event(EventKind.NODE_DOWN, "e", []), whole.number_of(KEYS[10]))
    assert index.behind(PrefixHits(), KEYS).in_tiers == 10
    for part in range(2):
        index.on_event(event(EventKind.OFF_DISK, "d", []), part)
    assert index.behind(PrefixHits(), KEYS) == PrefixHits()
    index.on_event(event(EventKind.ON_DISK, "d", KEYS))
    index.reset(0)
    assert not index.behind(PrefixHits(), KEYS).in_tiers


def test_what_went_out_of_memory_is_taken_to_be_where_all_see_it():
    redis = RedisTierConfig(url="redis://there")
    index = TierIndex(TiersConfig(redis=redis), most_remembered=10)
    index.on_event(event(EventKind.REMOVED, "d", KEYS))
    assert len(index._shared) == 10 and index.behind(PrefixHits(), KEYS).in_tiers == 0
    found = index.behind(PrefixHits(10, {"d": 10}), KEYS)
    assert (found.in_shared, found.in_tiers, found.on_disk) == (10, 10, {})
    index.missed(KEYS)
    assert not index
    for others in (TiersConfig(), TiersConfig(disk=DiskTierConfig(path="there", size=1 << 20))):  # type: ignore[arg-type]
        index = TierIndex(others)
        index.on_event(event(EventKind.REMOVED, "d", KEYS))
        assert not index
    rare = TierIndex(TiersConfig(redis=RedisTierConfig(url="redis://there", admission="second_use")))
    rare.on_event(event(EventKind.REMOVED, "d", KEYS))
    assert not rare, "most of it is in no tier"


async def test_a_node_that_had_nothing_in_its_tiers_ends_the_guess():
    rig = await make_rig()
    for fake in rig.nodes.nodes:
        fake.tiers = [TierReport(name="redis", shared=True)]
    await rig.prober.probe()
    rig.cluster.tiers = rig.cluster.caches._tiers = TierIndex(TiersConfig(redis=RedisTierConfig(url="redis://there")))
    prompt = RequestSpec("r", list(range(100)), SamplingParams(max_tokens=2, temperature=0))
    rig.cluster.tiers.on_event(event(EventKind.NODE_DOWN, "d", []))
    rig.cluster.tiers._shared[ChunkKey(bytes(16))] = None
    rig.dispatcher.route(prompt)
    (keys,) = prompt.keys.values()
    rig.cluster.tiers.on_event(event(EventKind.REMOVED, "d", keys))
    async with rig.dispatcher.open(prompt) as run:
        assert run.record.route is not None and run.record.route.reason == "all_chunks_cached"
        async for _ in run:
            pass
    assert not rig.cluster.tiers._shared.keys() & set(keys)
