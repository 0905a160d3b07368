"""docs/troubleshoot.md explains everything that a cluster says: the sets are the code's own."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec

from kvcore.errors import KVFerryError
from kvstore.counters import Count
from kvstore.types import GetOutcome
from metadata_server.messages import QuarantineReason, ReserveStatus
from router.requests.records import RING, RequestRecord
from router.routing import scorers
from router.routing.decision import MAX_EXPLAINED
from router.routing.policy import DECODER_FILTERS, PREFILLER_FILTERS, Scorer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/troubleshoot.md").read_text()


def section(heading: str) -> str:
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return found


def named(text: str) -> set[str]:
    """What the first cells of a section's tables name."""
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def errors(kind: type[KVFerryError] = KVFerryError) -> Iterator[type[KVFerryError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from errors(child)


def fields(kind: type[msgspec.Struct], path: str = "") -> Iterator[str]:
    """Every path of a record, lists as `legs[]`."""
    for name, hint in get_type_hints(kind).items():
        if name not in kind.__struct_fields__:
            continue
        yield path + name
        many = "[]" if str(hint).startswith("list") else ""
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                yield from fields(part, f"{path}{name}{many}.")


def counted(folder: str) -> set[str]:
    code = "\n".join(path.read_text() for path in sorted((ROOT / folder).rglob("*.py")))
    return set(re.findall(r'(?:counters|counts|totals)\[f?"([^"]+)"\]', code))


def test_every_error_code_is_explained_with_its_status_and_whether_it_is_tried_elsewhere():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (yes|no) \|", section("Error codes"), re.M)
    expected = {(kind.code, str(kind.http_status), "yes" if kind.retryable else "no") for kind in errors()}
    assert set(rows) == {row for row in expected if row[0].islower()}


def test_the_routers_own_codes_are_explained():
    code = (ROOT / "router/api/app.py").read_text()
    own = set(re.findall(r'\d+: "(\w+)"', code)) | set(re.findall(r'code="(\w+)"', code))
    assert own <= named(section("Error codes"))
    assert {"unknown_route", "method_not_allowed", "unknown_request"} <= own


def test_every_field_of_a_record_is_explained_and_no_other():
    assert named(section("A request's record")) == set(fields(RequestRecord))
    assert f"last {RING} in memory" in PAGE
    assert f"at most {MAX_EXPLAINED}" in PAGE


def test_every_reason_of_a_route_is_explained_and_no_other():
    code = (ROOT / "router/routing/policy.py").read_text()
    reasons = set(re.findall(r'"([a-z]+(?:_[a-z]+)+)"', code))
    assert len(reasons) >= 6
    assert named(section("Reasons of a route")) == reasons


def test_why_nodes_are_left_out_is_explained():
    reasons = named(section("Why a node is not used"))
    assert {rule.reason for rule in (*DECODER_FILTERS, *PREFILLER_FILTERS)} <= reasons
    cluster = (ROOT / "router/nodes/cluster.py").read_text()
    said = re.findall(r'problem(?:: str \| None)? = "([^"]+)"|return "([a-z ]+)"$', cluster, re.M)
    assert {first or second for first, second in said} <= reasons
    assert said


def test_every_scorer_is_explained():
    for scorer in vars(scorers).values():
        assert not isinstance(scorer, Scorer) or f"`{scorer.name}`" in section("A request's record")


def test_every_counter_is_explained():
    names = named(section("Counters"))
    index = counted("metadata_server") - {"declined_{result.status.value}", "quarantined_{item.reason.value}"}
    index |= {f"declined_{status}" for status in (ReserveStatus.EXISTS, ReserveStatus.BUSY, ReserveStatus.FULL)}
    index |= {f"quarantined_{reason}" for reason in QuarantineReason}
    bad = [outcome for outcome in GetOutcome if outcome is not GetOutcome.OK]
    store = {*Count, *(f"{what}_{outcome}" for what in ("miss", "replica") for outcome in bad)}
    engine = counted("engines") - {"chunk_miss_{outcome}", "{what}_failed"} | {f"chunk_miss_{o}" for o in bad}
    assert len(index) > 20
    assert len(engine) > 8
    assert (index | store | engine) - names == set()
