"""What engines are taken to have read of others' chunks, and when they are not any more."""

from msgspec.structs import replace
from support.router_fakes import CHUNK_TOKENS, Rig, make_rig

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.types import ChunkKey
from router.routing.held import HeldPrefixes
from router.routing.index import KeptKeys, PrefixHits, PrefixIndex
from router.routing.views import NO_HITS

PROMPT = list(range(10 * CHUNK_TOKENS + 1))


async def rig_with(chunks: int) -> tuple[Rig, KeptKeys]:
    """So many of the prompt's chunks lie in d0's memory. Returns all their keys."""
    rig = await make_rig()
    fingerprint = rig.cluster.view().decoders[0].fingerprint
    keys = chunk_keys(root_key(fingerprint), PROMPT, CHUNK_TOKENS)
    rig.cluster.index.store("d0", keys[:chunks], "d0.1")
    return rig, {(fingerprint, CHUNK_TOKENS): keys}


def holders(rig: Rig, kept: KeptKeys) -> PrefixHits:
    return next(iter(rig.cluster.hits(rig.cluster.view(), PROMPT, b"", kept).values()), NO_HITS)


async def test_a_node_holds_what_it_has_read_as_far_as_it_is_in_some_memory():
    rig, kept = await rig_with(6)
    rig.cluster.computed("d1", kept)
    assert holders(rig, kept) == PrefixHits(6, {"d0": 6, "d1": 6}, machine="h")
    (keys,) = kept.values()
    rig.cluster.index.store("p0", keys[6:], "p0.1")
    assert holders(rig, kept) == PrefixHits(10, {"d0": 6, "d1": 10}, machine="h")
    rig.cluster.index.drop_node("d0")
    assert holders(rig, kept) == PrefixHits(), "what lies in no memory is not counted on"
    assert rig.cluster.caches.held_chunks("d1") == 10 and rig.cluster.caches.held_chunks("d0") == 0


async def test_a_node_in_whose_memory_all_of_it_lies_has_read_nothing_of_others():
    rig, kept = await rig_with(10)
    rig.cluster.computed("d0", kept)
    rig.cluster.computed("nobody", kept)
    rig.cluster.computed("d1", {})
    assert "0 chunks in 0 engines" in repr(rig.cluster.caches)


async def test_an_engine_that_started_anew_or_is_away_has_nothing():
    rig, kept = await rig_with(6)
    node = rig.cluster.nodes["d1"]
    assert node.report is not None
    for changed in (
        replace(node.report, engine_restarts=node.report.engine_restarts + 1),
        replace(node.report, node=replace(node.report.node, incarnation=node.report.node.incarnation + 1)),
    ):
        rig.cluster.computed("d1", kept)
        assert holders(rig, kept).by_node == {"d0": 6, "d1": 6}
        rig.cluster.reported(node, changed)
        assert holders(rig, kept).by_node == {"d0": 6}
    rig.cluster.computed("d1", kept)
    node.problem = "no answer"
    rig.cluster.probed(node, None)
    assert holders(rig, kept).by_node == {"d0": 6, "d1": 6}, "not for one late answer"
    rig.cluster.probed(node, "no answer")
    assert holders(rig, kept).by_node == {"d0": 6}


async def test_no_more_is_remembered_than_an_engine_has_room_for():
    rig, kept = await rig_with(6)
    report, (keys,) = rig.cluster.nodes["d1"].report, kept.values()
    assert report is not None and report.engine is not None
    small = replace(report.engine, num_blocks=16, block_size=CHUNK_TOKENS)
    held = HeldPrefixes(share=0.5)
    held.read("d1", small, keys[:6])
    other = chunk_keys(root_key(b"o" * 16), PROMPT, CHUNK_TOKENS)
    held.read("d1", small, other[:6])
    assert held.count("d1") == 8
    assert held.with_these(PrefixHits(6), keys).by_node == {"d1": 2}, "ends go before beginnings"
    held.read("d1", small, keys[:6])
    assert held.with_these(PrefixHits(6), keys).by_node == {"d1": 6}


def test_what_very_many_hold_is_theirs_until_one_goes_and_another_comes_in_its_place():
    index, (first, second) = PrefixIndex(), (ChunkKey(bytes([number]) * 16) for number in range(2))
    names = [f"n{number}" for number in range(10)]
    for name in names:
        index.store(name, [first], f"{name}.1")
    index.store("n3", [second], "n3.2")
    for name in names[:6]:
        index.store(name, [second], f"{name}.1")
    for _ in range(2):
        counts = {name: 2 if name in names[:6] else 1 for name in names}
        assert index.find([first, second]) == PrefixHits(2, counts)
    index.drop_node("n0")
    del counts["n0"]
    assert index.find([first, second]) == PrefixHits(2, counts)
    for _ in range(600):
        index.sweep()  # the place of n0 is free again
    index.store("new", [first, second], "new.1")
    assert index.find([first, second]) == PrefixHits(2, counts | {"new": 2})
