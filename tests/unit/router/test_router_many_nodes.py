"""A router of many nodes: they are not all asked in one step, and what nobody asks about costs nothing."""

import asyncio
from collections import Counter
from contextlib import suppress
from heapq import nsmallest

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.router_fakes import FakeNode, FakeNodes, cluster_config, make_rig, node_app, serve
from support.sim_loop import LoopClock, run_sim

from kvcore.config.routing import RoutingPolicy
from kvcore.errors import NodeUnavailableError
from kvcore.types import ChunkKey, Role
from nodeapi.client import HttpNodeClient
from nodeapi.messages import NodeReport
from nodeapi.sampling import SamplingParams
from router.nodes.cluster import Cluster
from router.nodes.limits import NodeHealthLimits
from router.nodes.prober import Prober
from router.requests.records import RING, record_of
from router.requests.spec import RequestSpec
from router.routing.decision import Ranking
from router.routing.index import PrefixIndex
from router.routing.policy import make_policy
from router.routing.views import NodeView

LIMITS = NodeHealthLimits()


class Watched(FakeNodes):
    """Nodes that note when they were asked, by the loop's clock."""

    def __init__(self, nodes: list[FakeNode]) -> None:
        super().__init__(nodes)
        self.asked: list[tuple[float, str]] = []

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        self.asked.append((asyncio.get_running_loop().time(), self.by_url[url].id))
        return await super().info(url, timeout_s=timeout_s)


def many(count: int) -> Watched:
    return Watched([FakeNode(f"n{number}", Role.DECODER) for number in range(count)])


def probed(nodes: Watched, for_s: float, *, lost: str | None = None) -> Cluster:
    """By a prober that runs for so long. `lost`: a node that is down from the middle on."""

    async def go() -> Cluster:
        clock = LoopClock(asyncio.get_running_loop())
        config = cluster_config(nodes.nodes)
        cluster = Cluster(config, clock)
        running = asyncio.ensure_future(Prober(config.router, cluster, nodes, clock).run())
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(running), for_s / 2)
        if lost is not None:
            nodes[lost].down = True
        with suppress(TimeoutError):
            await asyncio.wait_for(running, for_s / 2)
        return cluster

    return run_sim(go)


def test_many_nodes_are_asked_a_few_at_a_time_and_each_as_often_as_one_of_a_few() -> None:
    few, lots = many(LIMITS.probes_at_once), many(300)
    for nodes in (few, lots):
        cluster = probed(nodes, 5.5)
        assert len(cluster.view().decoders) == len(nodes.nodes)
    often = set(Counter(name for _, name in few.asked).values())
    assert often == {7}, "at once, as they are new, and each second"
    assert set(Counter(name for _, name in lots.asked).values()) <= {6, 7}
    assert max(Counter(when for when, _ in lots.asked if when > 1).values()) <= LIMITS.probes_at_once
    assert len({when for when, _ in few.asked}) == 6


def test_probes_are_as_many_a_second_whatever_the_number_of_nodes() -> None:
    for count in (500, 1500):
        nodes, seconds = many(count), 9.0
        probed(nodes, seconds)
        often = Counter(name for _, name in nodes.asked)
        pause_s = max(1.0, count / LIMITS.probes_per_s)
        assert set(often.values()) <= {int(seconds / pause_s) + more for more in (0, 1, 2)} and len(often) == count
        by_second = Counter(int(when) for when, _ in nodes.asked if when >= 2)
        assert max(by_second.values()) <= 1.3 * min(count, LIMITS.probes_per_s), "batches that are due at its end"


def test_those_that_are_not_used_are_asked_first() -> None:
    nodes = many(200)
    probed(nodes, 6.0, lost="n199")
    last, first = ([when for when, name in nodes.asked if name == one] for one in ("n199", "n0"))
    assert last[0] > first[0] and last[-1] == first[-1]


async def test_a_report_that_says_nothing_new_is_read_once() -> None:
    node = FakeNode("d0", Role.DECODER)
    client = HttpNodeClient(connect_timeout_s=10, max_connections=2)
    async with serve(node_app(node)) as url:
        first, second = [await client.info(url, timeout_s=10) for _ in range(2)]
        assert first is second
        node.draining = True
        third = await client.info(url, timeout_s=10)
        assert third.draining and not first.draining
    await client.aclose()


async def test_a_node_that_comes_back_with_the_report_of_before_is_used_again() -> None:
    nodes = many(1)
    config, clock = cluster_config(nodes.nodes), LoopClock(asyncio.get_running_loop())
    cluster = Cluster(config, clock)
    report, node = nodes.nodes[0].report(), cluster.nodes["n0"]
    busy = msgspec.structs.replace(report, stats=msgspec.structs.replace(report.stats, running=3))
    for said in (report, report, busy):
        cluster.reported(node, said)
    assert cluster.view().decoders[0].sequences == 3
    work = cluster.work_chosen("n0", sequences=2, prefill_tokens=0)
    cluster.reported(node, busy)
    assert cluster.view().decoders[0].sequences == 3, "two of the three are ours"
    cluster.leg_ended(work)
    node.problem = NodeUnavailableError("silent").message
    assert not cluster.view().decoders and "silent" in cluster.why_no_decoder()
    cluster.reported(node, busy)
    assert [view.id for view in cluster.view().decoders] == ["n0"]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 20), st.data())
def test_the_candidates_of_a_record_are_the_best_in_their_order(totals, limit, data):
    nodes = [NodeView(f"n{place}", Role.DECODER, b"", 1, 1) for place in range(len(totals))]
    chosen = data.draw(st.integers(0, len(totals) - 1))
    ranking = Ranking(Role.DECODER, nodes, totals, (), (), (), chosen, nodes)
    best = [place for place in nsmallest(limit, range(len(totals)), key=totals.__getitem__) if place != chosen]
    assert [one.node for one in ranking.candidates(limit)] == [f"n{place}" for place in [chosen, *best][:limit]]


@pytest.mark.parametrize(("count", "policy"), [(2, "prefix_aware"), (200, "prefix_aware"), (200, "round_robin")])
async def test_a_choice_is_explained_when_its_record_is_asked_for_and_never_holds_on_to_many_nodes(
    count: int, policy: str
) -> None:
    compares_all = count == 200 and policy == "round_robin"
    nodes = FakeNodes([FakeNode(f"d{number}", Role.DECODER) for number in range(count)])
    rig = await make_rig(nodes, policy=make_policy(RoutingPolicy(policy)))
    decision = rig.dispatcher.route(RequestSpec("r", [1, 2, 3], SamplingParams(max_tokens=1)))
    async with rig.dispatcher.open(RequestSpec("r", [1, 2, 3], SamplingParams(max_tokens=1)), decision) as run:
        async for _ in run:
            pass
    assert run.record.route is not None and len(run.record.route.candidates) == (16 if compares_all else 0)
    held = [len(one.decoders.usable) for one in rig.log._unexplained.values()]
    assert held == ([] if compares_all else [0 if count == 200 else 2])
    assert rig.log.briefs()[0].route == msgspec.structs.replace(run.record.route, candidates=[], ways=[])
    for record in (rig.log.find("r"), *rig.log.newest(), *rig.log.named("r")):
        assert record is run.record and record.route is not None
        assert record.route.candidates == decision.candidates() and len(record.route.candidates) == min(count, 16)
        assert (record.route.left_out, record.route.ways) == (decision.left_out(), decision.best_ways())
    for number in range(RING):
        rig.log.open(record_of(RequestSpec(f"later-{number}", [1], SamplingParams(max_tokens=1)), decision), decision)
    assert rig.log.find("r") is None and len(rig.log._unexplained) <= RING


@pytest.mark.parametrize("count", [3000])
def test_the_segments_of_thousands_of_nodes_are_listed(count: int) -> None:
    index = PrefixIndex()
    keys = [ChunkKey(number.to_bytes(16, "big")) for number in range(count)]
    for number in range(count):
        index.store(f"n{number}", keys[number : number + 2], f"n{number}.1")
    assert index.find([keys[count - 1]]).by_node == {f"n{count - 2}": 1, f"n{count - 1}": 1}
    index.drop_node("n7")
    for _ in range(256):
        index.sweep()
    index.store("new", keys[:1], "new.1")
    assert index.bit(("new", "new.1")) == 1 << 7, "a bit that is free again is given out first"
    assert index.find(keys[:1]).by_node == {"n0": 1, "new": 1}


def test_keys_on_the_same_segments_share_what_says_so() -> None:
    index = PrefixIndex()
    keys = [ChunkKey(number.to_bytes(16, "big")) for number in range(100)]
    for name in [f"filler-{number}" for number in range(100)] + ["a", "b"]:
        index.store(name, keys if name in "ab" else keys[:1], f"{name}.1")
    index.remove("filler-0", keys[:1], "filler-0.1")
    masks = {id(mask) for table in index._tables for mask in table.values()}
    assert len(masks) == 2
