"""Documents as routing sees them: whoever has them counts as a holder, behind what a prefix has."""

from typing import Any

import pytest
from support.router_fakes import CHUNK_TOKENS, Rig, make_rig, spec, two_and_two

from kvcore.chunk_keys import prompt_keys
from kvcore.documents.keys import keys_of_documents
from nodeapi.documents import Documents
from nodeapi.sampling import SamplingParams
from router.documents.hits import document_hits
from router.documents.named import NamedDocuments
from router.requests.spec import RequestSpec
from router.routing.index import PrefixHits

HEADER = list(range(1, 1 + 2 * CHUNK_TOKENS))
TEXTS = [[40 + at] * size for at, size in enumerate((40, 50, 33))]
TOLD = Documents(header=32, spans=[(32, 72), (75, 125), (128, 161)], k=4)


def prompt() -> list[int]:
    between = [9, 9, 9]
    return [*HEADER, *TEXTS[0], *between, *TEXTS[1], *between, *TEXTS[2], *[5] * 20]


def asked(**fields: Any) -> RequestSpec:
    named = NamedDocuments("field", TOLD.header, TOLD.spans, k=TOLD.k, **fields)
    return RequestSpec("r", prompt(), SamplingParams(max_tokens=4), documents=named)


def keys() -> list[list[Any]]:
    return keys_of_documents(spec().fingerprint, b"", prompt(), 32, TOLD.spans, chunk_tokens=CHUNK_TOKENS)


async def rig_of(*, takes: bool = True) -> Rig:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.takes_documents = takes
    return await make_rig(nodes, min_prefill_tokens=16)


async def test_the_node_that_has_the_documents_is_preferred() -> None:
    for holder in ("d0", "d1"):
        rig = await rig_of()
        rig.cluster.index.store(holder, [key for names in keys() for key in names])
        for _ in range(3):
            route = rig.dispatcher.route(asked()).route
            assert route is not None and route.decoder == holder


async def test_documents_that_are_somewhere_need_no_prefiller_and_those_that_are_nowhere_do() -> None:
    rig = await rig_of()
    route = rig.dispatcher.route(asked()).route
    assert route is not None and route.prefiller is not None and route.expected_cached_tokens == 0
    header = prompt_keys(spec().fingerprint, b"", HEADER, CHUNK_TOKENS)
    rig.cluster.index.store("p0", header + [key for names in keys() for key in names])
    route = rig.dispatcher.route(asked()).route
    assert route is not None and (route.prefiller, route.reason) == (None, "all_chunks_cached")
    assert route.expected_cached_tokens == 32 + 40 + 46 + 29, "though the rest of the prompt is still to be computed"
    assert rig.dispatcher.route(asked(why="off")).route.prefiller is not None  # type: ignore[union-attr]


async def test_what_a_prefix_has_goes_first() -> None:
    rig = await rig_of()
    rig.cluster.index.store("d0", [key for names in keys() for key in names])
    rig.cluster.index.store("d1", prompt_keys(spec().fingerprint, b"", prompt(), CHUNK_TOKENS)[:10])
    route = rig.dispatcher.route(asked()).route
    assert route is not None and route.decoder == "d1"
    assert route.expected_cached_tokens == 160 + 1, "one token of the last document is behind that prefix"


async def test_nodes_that_take_none_are_passed_over_while_others_are_there() -> None:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.takes_documents = node.id in ("d1", "p1")
    rig = await make_rig(nodes, min_prefill_tokens=16)
    for _ in range(4):
        decision = rig.dispatcher.route(asked())
        assert decision.route is not None and (decision.route.prefiller, decision.route.decoder) == ("p1", "d1")
    assert any(out.node == "d0" and out.reason == "takes no documents" for out in decision.left_out())
    nodes["d1"].down = True
    await rig.prober.probe()
    assert rig.dispatcher.route(asked().changed(request_id="other")).route is not None


async def test_where_no_node_takes_them_nothing_is_looked_for() -> None:
    rig = await rig_of(takes=False)
    rig.cluster.index.store("d0", [key for names in keys() for key in names])
    route = rig.dispatcher.route(asked()).route
    assert route is not None and route.expected_cached_tokens == 0 and route.prefiller is not None


@pytest.mark.parametrize(
    ("cached", "whole", "expected"),
    [
        (0, (), (40 + 46 + 29, 0)),
        (0, (0, 2), (40 + 46 + 29, 40 + 29)),
        (80, (0, 1), (45 + 29, 45)),
        (160, (), (1, 0)),
        (176, (0, 1, 2), (0, 0)),
    ],
)
def test_what_is_reusable_and_in_reach(cached: int, whole: tuple[int, ...], expected: tuple[int, int]) -> None:
    names = keys()

    def find(wanted: Any) -> PrefixHits:
        at = names.index(wanted)
        return PrefixHits(len(wanted), {"n": 1}) if at in whole else PrefixHits(len(wanted) - 1, {"n": 1})

    found = document_hits(TOLD, names, find, cached_tokens=cached, chunk_tokens=CHUNK_TOKENS)
    assert (found.reusable, found.in_reach) == expected
    assert found.header == 32 and sum(found.by_node.values()) <= found.in_reach
    assert found.left(cached) == max(0, 32 - cached) + found.reusable - found.in_reach
