"""The guess at what plain servers cache."""

from collections.abc import Sequence

import pytest

from kvcore.chunk_keys import chunk_keys
from kvcore.clock import ManualClock
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig
from kvcore.handoff import HandoffKind
from kvcore.types import ChunkKey, Role
from router.nodes.cluster import Cluster
from router.routing import sent as sent_module
from router.routing.scorers import COMPUTE_OVER_LOAD, REMOTE_TOKENS, WHERE_FULL
from router.routing.sent import SentPrefixes
from router.routing.views import ClusterView, NodeView, RouteRequest

PROMPT = list(range(100))


def test_what_a_server_was_sent_is_found_as_far_as_it_goes_and_never_the_last_token() -> None:
    sent = SentPrefixes()
    sent.sent("p0", PROMPT, b"")
    sent.sent("p1", [*PROMPT[:40], *range(500, 560)], b"")
    hits = sent.find(PROMPT, b"")
    assert (hits.longest, hits.by_node, hits.each_its_own) == (96, {"p0": 96, "p1": 32}, True)
    assert sent.find(PROMPT[:96], b"").longest == 80
    assert hits.in_reach_of("p1") == 32 and hits.in_reach_of("p2") == 0


def test_where_caches_are_full_computing_again_counts_for_more() -> None:
    sent = SentPrefixes(max_blocks=6)
    sent.sent("p0", PROMPT, b"")
    few, nodes = sent.find(PROMPT, b""), [NodeView(name, Role.PREFILLER, b"kv", 1, 1 << 20) for name in ("p0", "p1")]
    sent.sent("p0", [9] * 32, b"")
    full = sent.find(PROMPT, b"")
    assert (few.full, full.full) == (False, True) and full.by_node["p0"] == 64
    scored = [
        REMOTE_TOKENS.score(RouteRequest(len(PROMPT), 0, hits={b"kv": hits}), nodes, None)[1] for hits in (few, full)
    ]
    assert scored == [96 * COMPUTE_OVER_LOAD, 64 * COMPUTE_OVER_LOAD * WHERE_FULL]
    sent.forget("p0")
    assert not sent.find(PROMPT, b"").full


def test_a_prompt_is_hashed_once_for_all_its_choices_and_legs(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counted(root: bytes, tokens: Sequence[int], size: int) -> list[ChunkKey]:
        hashed.append(len(tokens))
        return chunk_keys(root, tokens, size)

    monkeypatch.setattr(sent_module, "chunk_keys", counted)
    sent, prompts = SentPrefixes(max_hashed=20), [list(range(number, number + 100)) for number in range(4)]
    for server in ("p0", "d0"):
        for prompt in prompts[:2]:
            sent.sent(server, prompt, b"")
            assert sent.find(prompt, b"").longest == 96
    assert hashed == [100, 100]
    assert sent.find(prompts[0], b"other").longest == 0
    sent.sent("p0", prompts[2], b"")
    sent.sent("p0", prompts[3], b"")
    assert len(hashed) == 5 and len(sent._hashed) == 2, "those of long ago are not kept"
    for number in range(50):
        sent.sent("p0", [number], b"")
    assert len(sent._hashed) == 20 == sent._num_hashed


def test_another_salt_finds_nothing() -> None:
    sent = SentPrefixes()
    sent.sent("p0", PROMPT, b"a")
    assert sent.find(PROMPT, b"b").longest == 0 and sent.find(PROMPT, b"a").longest == 96


def test_a_server_forgets_what_it_was_sent_longest_ago_ends_first() -> None:
    sent = SentPrefixes(block_tokens=16, max_blocks=8)
    other = list(range(1000, 1064))
    sent.sent("p0", PROMPT, b"")
    sent.sent("p0", other, b"")
    assert sent.find([*PROMPT, 1], b"").longest == 64, "six blocks and four are two too many"
    assert sent.find([*other, 1], b"").longest == 64
    sent.sent("p0", PROMPT[:33], b"")
    sent.sent("p0", list(range(2000, 2064)), b"")
    assert sent.find([*PROMPT, 1], b"").longest == 32, "what was used again stays"


def test_a_server_that_starts_anew_has_nothing() -> None:
    sent = SentPrefixes()
    sent.sent("p0", PROMPT, b"")
    sent.sent("p1", PROMPT, b"")
    sent.forget("p0")
    sent.forget("p2")
    assert sent.find(PROMPT, b"").by_node == {"p1": 96}
    sent.sent("p0", PROMPT, b"")
    assert sent.find(PROMPT, b"").by_node == {"p0": 96, "p1": 96}


def test_a_server_that_was_silent_for_more_than_one_probe_is_taken_to_have_lost_its_cache() -> None:
    config = ClusterConfig(
        cluster="plain",
        handoff=HandoffKind.NIXL,
        model=ModelConfig(path="m", name="m"),
        nodes={"d0": NodeConfig(role=Role.DECODER, url="http://127.0.0.1:9")},
    )
    cluster = Cluster(config, ManualClock())
    node = cluster.nodes["d0"]
    node.problem = None
    cluster.chosen("d0", PROMPT, b"")

    def known() -> int:
        view = ClusterView(decoders=(NodeView("d0", Role.DECODER, b"kv", 1, 4096),))
        return cluster.hits(view, PROMPT, b"")[b"kv"].longest

    node.problem = "no answer"
    cluster.probed(node, None)
    assert known() == 96
    cluster.probed(node, "no answer")
    assert known() == 0
