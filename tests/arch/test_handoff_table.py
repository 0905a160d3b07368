"""What differs between kinds of handoff stands in one table: nothing else asks which kind it is."""

import ast
from pathlib import Path

from test_layout import ROOT, sources, with_words

from kvcore.handoff import HANDOFFS, HandoffKind, has_store

TABLES = {"kvcore/handoff.py", "router/nodes/vllm_requests.py"}


def comparisons(path: Path) -> list[str]:
    """Where a member of HandoffKind is compared with, or matched."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        asks = node if isinstance(node, ast.Compare | ast.MatchValue | ast.Dict) else None
        if asks is not None and any(
            isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "HandoffKind"
            for part in ast.walk(asks)
        ):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_no_other_module_asks_which_kind_it_is() -> None:
    asked = {at for path in with_words(sources(), r"\bHandoffKind\b") for at in comparisons(path)}
    assert {at.rpartition(":")[0] for at in asked} <= TABLES, asked


def test_each_kind_has_a_row() -> None:
    assert set(HANDOFFS) == set(HandoffKind)
    for kind, traits in HANDOFFS.items():
        ways = [traits.waits_in_store, traits.decode_after_prefill, traits.decode_beside_prefill]
        assert sum(ways) == 1, f"{kind}: KV reaches a decode leg in one way"
        assert has_store(kind) is traits.has_store
    assert not has_store("of another version")
