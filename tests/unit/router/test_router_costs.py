"""What the ways to a first token would take, and which one is taken; what is measured of nodes."""

import pytest
from msgspec.structs import replace
from support.router_fakes import CHUNK_TOKENS, make_rig, spec

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.types import Role
from nodeapi.messages import Moved, Promoted
from nodeapi.sampling import SamplingParams
from router.documents.hits import DocumentHits
from router.requests.records import LegRecord, RequestRecord, RouteRecord
from router.requests.spec import RequestSpec
from router.routing.costs import pays_to_stay, ways, worth_waiting_s
from router.routing.index import PrefixHits
from router.routing.limits import RateLimits
from router.routing.policies import prefix_aware
from router.routing.policy import STAYS, TRIES
from router.routing.rates import NO_DOUBT, Doubt, NodeRates, PairRate, Rate
from router.routing.scorers import HANDING_OVER, REMOTE_TOKENS
from router.routing.views import ClusterView, NodeView, RouteRequest

KV = spec(chunk_bytes=1 << 20)
"""1 MiB for 16 tokens."""
RATE = 20_000.0
GB = 1e9


def node(name: str, role: Role, **measured: float) -> NodeView:
    rates = {"prefill_rate": RATE, "step_s": 0.01, "near_rate": 4 * GB, "far_rate": GB} | measured
    return NodeView(name, role, KV.fingerprint, CHUNK_TOKENS, 1 << 20, kv_spec=KV, **rates)  # type: ignore[arg-type]


P, D = node("p", Role.PREFILLER), node("d", Role.DECODER)


def asked(tokens: int, cached_chunks: int = 0, on: str = "d") -> RouteRequest:
    hits = {KV.fingerprint: PrefixHits(cached_chunks, {on: cached_chunks} if cached_chunks else {})}
    return RouteRequest(tokens, 64, hits=hits)


def test_a_way_is_what_its_parts_take():
    here, there = ways(asked(70 * 16 + 65, 70), D, replace(P, prefill_tokens=2000))
    assert here.load_s == pytest.approx(70 * KV.chunk_bytes / (4 * GB)) and here.queue_s == here.handoff_s == 0
    assert there.load_s == pytest.approx(70 * KV.chunk_bytes / GB), "from the decoder's memory"
    assert there.queue_s == pytest.approx(0.1) and there.compute_s == here.compute_s == pytest.approx(65 / RATE)
    assert there.handoff_s == pytest.approx(4 * KV.chunk_bytes / (4 * GB))
    parts = there.queue_s + there.load_s + there.compute_s + there.handoff_s
    assert there.expected_s == pytest.approx(parts + D.step_s)


def naming(tokens: int, **by_node: float) -> RouteRequest:
    """1,000 tokens of documents in reach."""
    hits = DocumentHits(header=16, reusable=1000, in_reach=1000, by_node=by_node)
    return RouteRequest(tokens, 64, hits={KV.fingerprint: PrefixHits(0, {})}, documents={KV.fingerprint: hits})


@pytest.mark.parametrize(("by_node", "rate"), [({"d": 1000.0}, 4 * GB), ({"p": 1000.0}, GB), ({}, GB)])
def test_documents_that_are_there_are_loaded_by_the_decoder_whoever_computes_the_rest(
    by_node: dict[str, float], rate: float
):
    takes = replace(D, takes_documents=True), replace(P, takes_documents=True)
    here, there = ways(naming(1600, **by_node), *takes)
    load_s, rest_s = 1000 / 16 * KV.chunk_bytes / rate, 600 / RATE
    assert (here.load_s, here.compute_s) == (pytest.approx(load_s), pytest.approx(rest_s))
    assert here.expected_s == pytest.approx(load_s + rest_s + D.step_s)
    handed_s = (99 - 1000 / 16) * KV.chunk_bytes / (4 * GB)
    assert (there.load_s, there.handoff_s) == (0, pytest.approx(handed_s + load_s))
    assert there.expected_s == pytest.approx(rest_s + handed_s + load_s + D.step_s)


def test_a_decoder_of_whose_reading_nothing_is_known_is_not_compared_by_documents():
    takes = replace(D, takes_documents=True, far_rate=0.0), replace(P, takes_documents=True)
    assert ways(naming(1600), *takes) == ()
    assert len(ways(naming(1600, d=1000.0), *takes)) == 2


def chosen(request: RouteRequest, *decoders: NodeView, prefiller: NodeView = P) -> tuple[str | None, str]:
    found = prefix_aware.make().choose(request, ClusterView((prefiller,), decoders or (D,)))
    assert found.route is not None
    return found.route.prefiller, found.route.reason


def test_a_short_rest_behind_much_that_is_cached_is_computed_where_that_lies():
    """64 tokens were sent to a prefiller that first loaded 70 MiB for them."""
    assert chosen(asked(70 * 16 + 65, 70)) == (None, STAYS)


def test_a_decoder_that_computes_only_in_need_leaves_the_same_rest_to_a_prefiller_and_waits_for_it():
    never = replace(asked(70 * 16 + 65, 70), weighs=False)
    found = prefix_aware.make().choose(never, ClusterView((P,), (D,)))
    assert found.route is not None and (found.route.prefiller, found.route.reason) == ("p", "prefix_hit")
    assert found.ways and found.worth_waiting_s is None
    weighed = prefix_aware.make().choose(asked(2000), ClusterView((P,), (D,)))
    assert weighed.worth_waiting_s is not None
    alone = prefix_aware.make().choose(never, ClusterView((), (D,)))
    assert alone.route is not None and (alone.route.decoder, alone.route.reason) == ("d", "no_prefiller")


def test_a_long_rest_is_worth_loading_for():
    assert chosen(asked(70 * 16 + 8000, 70)) == ("p", "prefix_hit")


def test_without_anything_cached_a_prefiller_computes():
    assert chosen(asked(2000)) == ("p", "no_prefix")


def test_a_decoder_that_has_much_to_compute_leaves_it_to_the_prefiller():
    busy = replace(D, prefill_tokens=10_000)
    assert chosen(asked(70 * 16 + 65, 70), busy) == ("p", "prefix_hit")


@pytest.mark.parametrize("unknown", [{"prefill_rate": 0.0}, {"near_rate": 0.0, "far_rate": 0.0}])
def test_what_was_not_measured_decides_nothing(unknown: dict[str, float]):
    request = asked(70 * 16 + 65, 70)
    assert chosen(request, node("d", Role.DECODER, **unknown)) == ("p", "prefix_hit")
    assert ways(request, node("d", Role.DECODER, **unknown), node("p", Role.PREFILLER, **unknown)) == ()
    assert not pays_to_stay(()) and worth_waiting_s(()) is None


def test_another_prefiller_for_a_decoder_that_waits_is_found_in_any_case():
    assert chosen(replace(asked(70 * 16 + 65, 70), decoder="d", min_prefill_tokens=0))[0] == "p"


def test_a_decoder_waits_for_a_prefiller_twice_as_long_as_both_take():
    found = ways(asked(20_000), D, P)
    assert worth_waiting_s(found) == pytest.approx(2 * (found[1].expected_s + 1.0))
    assert worth_waiting_s(ways(asked(200), D, P)) == 1.0, "never less"


SHORT_REST = asked(70 * 16 + 65, 70)
"""Behind much that is cached: a prefiller would move more than it saves."""


def tried(doubt: Doubt, now: float, *, computing: Doubt = NO_DOUBT, request: RouteRequest = SHORT_REST, **slow: float):
    """(prefiller, reason) when what is known of the decoder's computing, and of the prefiller's reading, is so old."""
    decoder = replace(node("d", Role.DECODER, **slow), doubts={("compute", ""): computing})
    return chosen(replace(request, now=now), decoder, prefiller=replace(P, doubts={("far", ""): doubt}))


def test_what_speaks_against_moving_is_doubted_when_many_kept_away_for_long():
    assert tried(Doubt(100.0, 8), 110.0) == ("p", TRIES)
    assert tried(Doubt(100.0, 7), 110.0) == (None, STAYS), "too few"
    assert tried(Doubt(100.0, 8), 109.9) == (None, STAYS), "too soon"
    busy = replace(P, doubts={("far", ""): Doubt(100.0, 8)}, prefill_tokens=20_000)
    assert chosen(replace(SHORT_REST, now=110.0), prefiller=busy) == (None, STAYS), "nothing would be seen in time"


def test_a_try_is_waited_for_no_longer_than_computing_takes():
    found = ways(SHORT_REST, replace(D, prefill_rate=50.0), replace(P, prefill_tokens=100_000))
    assert worth_waiting_s(found, tries=True) == pytest.approx(2 * found[0].expected_s)
    assert worth_waiting_s(ways(SHORT_REST, D, P), tries=True) == 1.0


def test_a_decoder_that_seemed_slow_at_computing_is_tried_again_where_that_costs_little():
    slow, old = {"prefill_rate": RATE / 40}, Doubt(100.0, 8)
    assert tried(Doubt(), 110.0, computing=Doubt(100.0, 7), **slow) == ("p", "prefix_hit")
    assert tried(Doubt(), 110.0, computing=old, **slow) == (None, TRIES)
    assert tried(Doubt(), 110.0, computing=old, prefill_rate=RATE / 500) == ("p", "prefix_hit"), "over a second more"
    assert tried(Doubt(), 110.0, computing=old, request=asked(2000), **slow) == ("p", "no_prefix"), "nothing to load"


def test_a_way_is_doubted_by_those_that_avoid_it_until_it_is_measured_or_tried():
    rates, read = NodeRates(), Moved(transport="tcp", direction="get", num_bytes=1, seconds=1.0)
    rates.moved([read], 1.0)
    changes = rates.changes
    for _ in range(20):
        rates.spoke_against("far", "", tried_at=None)
    assert rates.far.doubt.avoided == 8 and rates.changes == changes + 8, "who is doubted enough changes no more"
    rates.moved([replace(read, transport="shm")], 2.0)
    rates.prefilled(100, 0.1, 3.0)
    rates.wrote([replace(read, direction="put")], "there", 4.0)
    assert rates.far.doubt.avoided == 8, "by its own kind"
    rates.spoke_against("far", "", tried_at=5.0)
    assert rates.far.doubt == Doubt(5.0, 0)
    rates.spoke_against("far", "", tried_at=None)
    rates.moved([read], 7.0)
    assert rates.doubts() == {
        ("far", ""): Doubt(7.0, 0),
        ("near", ""): Doubt(2.0, 0),
        ("compute", ""): Doubt(3.0, 0),
        ("put", "there"): Doubt(4.0, 0),
    }


def test_what_a_prefiller_writes_counts_by_the_machine_that_it_writes_to():
    """While it computes it writes: only what takes longer than that is waited for."""
    request, handed = asked(2000), 124 * KV.chunk_bytes
    writes = replace(P, machine="here", put_rates=dict.fromkeys(("here", "there"), PairRate(1e7, 90.0)))
    near, far = (ways(request, replace(D, machine=machine), writes)[1] for machine in ("here", "there"))
    assert near.handoff_s == pytest.approx(handed / (4 * GB)), "on one machine the decoder's reading alone"
    assert far.handoff_s == pytest.approx(handed / 1e7 - far.compute_s + handed / (4 * GB))
    away = replace(D, machine="there")
    assert chosen(request, away, prefiller=writes) == (None, STAYS)
    old = replace(writes, doubts={("put", "there"): Doubt(100.0, 8)})
    assert chosen(replace(request, now=110.0), away, prefiller=old) == ("p", TRIES)
    assert chosen(request, replace(D, machine="here"), prefiller=writes) == ("p", "no_prefix")


def test_writes_are_told_by_the_machine_of_the_decoder_and_bounded():
    rates, put = NodeRates(), Moved(transport="tcp", direction="put", num_bytes=4000, seconds=2.0)
    rates.wrote([put], "there", 0.0)
    rates.wrote([put], "", 0.0)
    rates.wrote([put, replace(put, transport="shm")], "here", 0.0)
    assert {machine: rate.per_s for machine, rate in rates.puts.items()} == {"there": 2000}
    for number in range(100):
        rates.wrote([put], str(number), 0.0)
    assert len(rates.puts) == 64 and "there" not in rates.puts


def test_one_fast_measurement_ends_a_long_slow_time_once_that_is_old():
    rate = Rate()
    for second in range(100):
        rate.add(10, 5.0, float(second))
    rate.add(10, 0.01, 110.0)
    assert rate.per_s > 400, "half of 1,000, at 2 before"
    for second in range(30):
        rate.add(10, 5.0, 111.0 + second)
    assert rate.per_s == pytest.approx(2, rel=0.1)


def test_time_makes_a_measurement_count_less():
    often, rarely = Rate(), Rate()
    for rate, every_s in ((often, 0.01), (rarely, 5.0)):
        for count in range(20):
            rate.add(10, 1.0, every_s * count)
        for count in range(20, 25):
            rate.add(10, 0.1, every_s * count)
    assert often.per_s < 20 and rarely.per_s > 30


def test_what_was_compared_and_what_came_of_it_is_in_the_record():
    found = prefix_aware.make().choose(asked(2000), ClusterView((P,), (D,)))
    assert [way.node for way in found.best_ways()] == ["p", "d"]
    assert found.expected_s == found.ways[1].expected_s
    stays = prefix_aware.make().choose(asked(70 * 16 + 65, 70), ClusterView((P,), (D,)))
    assert [way.node for way in stays.best_ways()] == ["d", "p"] and stays.expected_s == stays.ways[0].expected_s


async def test_records_and_metrics_say_what_was_expected_and_legs_teach_it():
    rig = await make_rig()
    for known in rig.cluster.nodes.values():
        known.rates.prefilled(1000, 0.1, 0.0)
        known.touch()
    prompt = RequestSpec("r", list(range(100)), SamplingParams(max_tokens=2, temperature=0))
    async with rig.dispatcher.open(prompt) as run:
        async for _ in run:
            pass
    record = rig.log.newest()[0]
    assert record.route is not None and record.route.expected_s == pytest.approx(0.01)
    assert [way.node[0] for way in record.route.ways] == ["p", "d"]
    assert record.forecast_error_s is not None and record.ttft_s is not None
    assert record.forecast_error_s == pytest.approx(record.ttft_s - 0.01)
    assert 'kvferry_router_forecast_error_seconds_count{way="prefiller"} 1.0' in rig.metrics.metrics.render().decode()
    sent = rig.nodes["d0"].generates or rig.nodes["d1"].generates
    assert sent[0].handoff is not None and sent[0].handoff.wait_s == pytest.approx(1.0)


def test_a_rate_follows_the_latest_and_forgets_a_warm_up():
    rate = Rate()
    rate.add(100, 60.0, 0.0)
    assert rate.per_s == pytest.approx(100 / 60)
    rate.add(100, 0.1, 0.0)
    assert rate.per_s == pytest.approx(1000)
    rate.add(100, 60.0, 0.0)
    assert rate.per_s > 150, "an accident counts as eight times slower at most"
    for _ in range(80):
        rate.add(100, 0.2, 0.0)
    assert rate.per_s == pytest.approx(500, rel=0.05)
    rate.add(0, 1.0, 0.0)
    assert rate.per_s == pytest.approx(500, rel=0.05)


def test_what_was_given_up_counts_where_it_took_twice_as_long_as_was_expected_or_nothing_was():
    rates = NodeRates()
    late = Moved(transport="tcp", direction="get", num_bytes=0, late_bytes=1000, seconds=5.0, machine="there")
    rates.moved([late], 0.0)
    rates.wrote([replace(late, direction="put")], "there", 0.0)
    rates.gave_up(1000, 5.0, "elsewhere", 0.0)
    assert rates.far.per_s == rates.reads["there"].per_s == rates.puts["there"].per_s == rates.puts["elsewhere"].per_s
    assert rates.far.per_s == 200
    for second in range(1, 4):
        rates.moved([replace(late, num_bytes=1000, late_bytes=0, seconds=1.0)], float(second))
    assert rates.far.per_s == pytest.approx(1000)
    rates.moved([replace(late, seconds=1.9)], 4.0)
    assert rates.far.per_s == pytest.approx(1000), "it was behind others"
    rates.moved([replace(late, seconds=2.1)], 5.0)
    assert 700 < rates.far.per_s < 900
    rates.moved([replace(late, seconds=0.0)], 6.0)
    rates.gave_up(1000, -1.0, "elsewhere", 6.0)
    assert rates.puts["elsewhere"].per_s == 200, "it had no time"


def test_prompts_that_are_computed_at_once_count_together():
    rates = NodeRates()
    for done in range(1, 20):
        rates.prefilled(400, 1.6, now=1.6 * done)
        for _ in range(3):
            rates.prefilled(400, 1.6, now=1.6 * done)
    known = rates.prefill.per_s
    assert known == pytest.approx(1000, rel=0.15)
    rates.prefilled(3, 1.0, now=100.0)
    assert rates.prefill.per_s == known, "a step takes as long for one token"


def test_reads_are_told_by_where_they_come_from():
    rates = NodeRates()
    for transport in ("shm", "tcp"):
        size = 4000 if transport == "shm" else 1000
        rates.moved([Moved(transport=transport, direction="get", num_bytes=size, seconds=1.0)], 0.0)
        rates.moved([Moved(transport=transport, direction="put", num_bytes=9, seconds=1.0)], 0.0)
    assert (rates.near.per_s, rates.far.per_s) == (4000, 1000)


def test_reads_from_another_machine_are_told_by_that_machine_for_a_while():
    rates = NodeRates()
    for machine, seconds in (("near", 1.0), ("slow", 10.0), ("", 1.0)):
        move = Moved(transport="tcp", direction="get", num_bytes=1000, seconds=seconds, machine=machine)
        rates.moved([move], 5.0)
    rates.moved([Moved(transport="shm", direction="get", num_bytes=1000, seconds=1.0, machine="own")], 5.0)
    assert {name: pair.per_s for name, pair in rates.read_rates().items()} == {"near": 1000, "slow": 100}
    reader = replace(D, machine="own", read_rates=rates.read_rates(), far_rate=500.0)
    assert [reader.read_rate(name, 20.0) for name in ("own", "near", "slow", "new")] == [4 * GB, 1000, 100, 500]
    assert reader.read_rate("slow", 36.0) == 500, "it is doubted, and tried again"
    for number in range(100):
        rates.moved([Moved(transport="tcp", direction="get", num_bytes=1, seconds=1.0, machine=f"m{number}")], 5.0)
    assert len(rates.reads) == RateLimits().most_machines


def test_what_lies_on_a_machine_to_which_the_link_is_slow_takes_long_and_is_left_to_others():
    pairs = {"h": PairRate(GB / 10, 0.0)}
    slow, fast = replace(D, read_rates=pairs), replace(D, id="e", read_rates={"h": PairRate(GB, 0.0)})
    hits = {KV.fingerprint: PrefixHits(70, {"s": 70}, machine="h")}
    request = RouteRequest(70 * 16 + 1, 64, hits=hits)
    assert ways(request, slow, None)[0].load_s == pytest.approx(10 * ways(request, fast, None)[0].load_s)
    new = replace(D, id="n")
    assert REMOTE_TOKENS.score(request, [slow, fast, new], None) == [pytest.approx(10 * 70 * 16), 70 * 16, 70 * 16]
    later = replace(request, now=40.0)
    assert REMOTE_TOKENS.score(later, [slow, fast, new], None) == [70 * 16] * 3


def test_a_sequence_counts_by_what_it_holds_and_by_its_steps():
    rates = NodeRates()
    rates.decoded(101, 1, 2.0, 0.0)
    assert rates.steps.each_s == pytest.approx(0.02) and rates.stays.each_s == pytest.approx(2.0)
    rates.decoded(202, 2, 2.0, 0.0)
    assert rates.steps.each_s == pytest.approx(0.02) and rates.stays.each_s == pytest.approx(2.0)


def test_the_error_of_a_forecast_is_told_by_the_way():
    def record(prefiller: str | None, *promoted: Promoted) -> RequestRecord:
        legs = [LegRecord(id="r.d1", node="d", kind="decode", promoted=list(promoted))]
        return RequestRecord(
            id="r", prompt_tokens=1, route=RouteRecord(prefiller=prefiller, decoder="d", reason=""), legs=legs
        )

    assert [record("p").way, record(None).way] == ["prefiller", "decoder"]
    assert record("p", Promoted(tier="disk", num_chunks=1)).way == "tier"


async def test_a_prompt_that_waits_is_hashed_once(monkeypatch: pytest.MonkeyPatch):
    rig = await make_rig()
    keys = chunk_keys(root_key(rig.cluster.view().decoders[0].fingerprint), range(100), CHUNK_TOKENS)
    rig.cluster.index.store("d0", keys, "d0.1")
    asked, hashed = RequestSpec("r", list(range(100)), SamplingParams(max_tokens=2, temperature=0)), []
    monkeypatch.setattr("router.routing.engine_caches.prompt_keys", lambda *args: hashed.append(args) or keys)
    for _ in range(3):
        found = rig.dispatcher.route(asked)
        assert found.route is not None and found.route.expected_cached_tokens == 96
    assert len(hashed) == 1 and not asked.changed(prompt_token_ids=[1]).keys, "another prompt's are others"


def test_a_prefiller_counts_more_for_what_it_only_writes_after_computing():
    away, full = replace(D, machine="there"), 124 * KV.chunk_bytes
    slow, fast = ({"there": PairRate(full / seconds, 0.0)} for seconds in (10.0, 0.01))
    nodes = [
        replace(P, id=str(number), machine="here", put_rates=pairs) for number, pairs in enumerate((slow, fast, {}))
    ]
    nodes.append(replace(P, id="beside", machine="there", put_rates=slow))
    score = lambda request, some=nodes: HANDING_OVER.score(request, some, away)  # noqa: E731
    assert score(asked(2000)) == [pytest.approx(10 * RATE - 2000), 0.0, 0.0, 0.0]
    assert score(asked(2000), [nodes[0], nodes[2]]) == [pytest.approx(10 * RATE - 2000)] * 2, "no better than is known"
    assert not any(score(replace(asked(2000), now=40.0))), "it is tried again"
    assert not any(HANDING_OVER.score(asked(2000), nodes, None))
    assert chosen(asked(2000), away, prefiller=nodes[0]) == (None, STAYS)
