"""The gate of documents: by what it turns a kind off, that it stays so, and what routers tell each other of it."""

import math

import msgspec
import pytest

from kvcore.config.kv.settings import BlendConfig
from router.shadow.gate import BlendGate
from router.shadow.limits import BlendGateLimits

LIMITS = BlendGateLimits(judged_from=3, window=5, kinds=4)
GOOD, BAD = (0.01, 1.0), (2.0, 0.5)


def made(**config: float) -> BlendGate:
    return BlendGate(BlendConfig(mode="first_k", **config), lambda: 1000.0, LIMITS)  # type: ignore[arg-type]


def fed(gate: BlendGate, *said: tuple[float, float], kind: str = "field") -> list[str]:
    return [gate.compared("m", kind, *one) for one in said]


def test_a_kind_goes_off_once_enough_was_compared_and_says_why():
    gate = made()
    assert fed(gate, BAD, BAD) == ["", ""] and gate.why_off("m", "field") == ""
    [why] = fed(gate, BAD)
    assert gate.why_off("m", "field") == f"turned off, until `kvferry blend on`: {why}" and "3 comparisons" in why
    assert "2 nats (at most 0.3)" in why and "50% of tokens agreed (at least 80%)" in why
    assert gate.problem() is not None and "field of m" in str(gate.problem())


@pytest.mark.parametrize(("kl", "agreement"), [(math.inf, 1.0), (math.nan, 1.0), (0.31, 1.0), (0.0, 0.79)])
def test_either_mean_is_enough(kl, agreement):
    assert fed(made(), *[(kl, agreement)] * 3)[-1]


def test_a_divergence_that_is_no_number_is_told_as_one():
    gate = made(max_kl=20.0, min_agreement=0)
    fed(gate, (math.nan, 1.0))
    assert gate.report().kinds[0].kl == LIMITS.most_nats


def test_at_the_bounds_it_stays_on():
    gate = made()
    assert not any(fed(gate, *[(0.3, 0.8)] * 20)) and gate.problem() is None


def test_what_is_older_than_the_window_counts_no_more():
    gate = made(max_kl=1.0, min_agreement=0)
    assert not any(fed(gate, GOOD, GOOD, GOOD, GOOD, (4.0, 1.0), *[GOOD] * 5))
    assert gate.report().kinds[0].kl == pytest.approx(0.01)


def test_kinds_and_models_are_judged_apart():
    gate = made()
    fed(gate, BAD, BAD, BAD)
    assert gate.why_off("m", "part") == "" == gate.why_off("adapter", "field")


def test_what_is_off_stays_off_and_is_turned_on_by_order_alone():
    gate = made()
    told: list[int] = []
    gate.on_change.append(lambda: told.append(1))
    fed(gate, BAD, BAD, BAD)
    assert not any(fed(gate, *[GOOD] * 100)) and gate.why_off("m", "field")
    assert gate.turn_on(["field"]) == ["field of m"] and gate.turn_on() == []
    assert gate.why_off("m", "field") == "" and len(told) == 2
    assert not any(fed(gate, BAD, BAD)), "it is judged anew"
    assert fed(gate, BAD)[0]


def test_a_kind_that_is_not_known_cannot_be_turned_on():
    with pytest.raises(KeyError, match="elsewhere"):
        made().turn_on(["elsewhere"])


def test_more_kinds_than_can_be_judged_are_not_reused():
    gate = made()
    for number in range(4):
        assert gate.why_off(f"m{number}", "field") == ""
    assert "more models" in gate.why_off("m9", "field") and gate.compared("m9", "field", *BAD) == ""
    assert len(gate.report().kinds) == 4


# --- several routers ---


def tell(source: BlendGate, *targets: BlendGate) -> None:
    for target in targets:
        target.told(msgspec.convert(msgspec.to_builtins(source.switches()), type=type(source.switches())))


def test_routers_follow_each_other_off_and_on():
    one, two = made(), made()
    fed(one, BAD, BAD, BAD)
    assert [said.off for said in two.told(one.switches())] == [said.off for said in one.switches()] != [""]
    assert two.why_off("m", "field") == one.why_off("m", "field")
    assert two.told(one.switches()) == [], "it knows that already"
    two.turn_on()
    assert [said.off for said in one.told(two.switches())] == [""] and one.why_off("m", "field") == ""


def test_a_router_that_starts_anew_hears_that_a_kind_is_off():
    one = made()
    fed(one, BAD, BAD, BAD)
    again = made()
    assert one.told(again.switches()) == []
    assert again.told(one.switches()) and again.why_off("m", "field")


def test_of_two_changes_at_once_off_holds_on_both():
    one, two = made(), made()
    fed(one, BAD, BAD, BAD)
    two.told(one.switches())
    one.turn_on()
    two.turn_on()
    fed(two, BAD, BAD, BAD)
    one.told(two.switches())
    assert one.why_off("m", "field")
    fed(three := made(), BAD, BAD, BAD)
    three.told(one.switches())
    one.told(three.switches())
    assert one.switches() == three.switches()
