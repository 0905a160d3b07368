"""What was measured, as samples, medians and tables."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from benchmarks.vllm_pd_client import NEW_TOKENS, Measured


@dataclass(frozen=True, slots=True)
class Round:
    """One prompt of one length: asked of the plain vLLM, then of the system; what else the system can do."""

    plain: Measured
    whole: Measured
    decoder_ttft_s: float | None
    reuse: Measured | None


@dataclass(slots=True)
class SystemResult:
    """One system's rounds by prompt length, or why there are none."""

    name: str
    rounds: dict[int, list[Round]] = field(default_factory=dict)
    problem: str | None = None


def median(values: Iterable[float | None]) -> float | None:
    """None: there are no values."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def of(result: SystemResult, tokens: int, value: Callable[[Round], float | None]) -> float | None:
    """The median of one figure over the rounds of one length."""
    return median(value(one) for one in result.rounds.get(tokens, []))


def token_s(measured: Measured) -> float:
    """Seconds a token, of those after the first."""
    return (measured.total_s - measured.ttft_s) / (NEW_TOKENS - 1)


def row(results: list[SystemResult], tokens: int) -> dict[str, float | int | None]:
    """One row of RESULT. `same_tokens`: the share of answers that equal the plain vLLM's to the last token."""
    rounds = [one for result in results for one in result.rounds.get(tokens, [])]
    beside = [value for result in results if (value := of(result, tokens, lambda one: one.plain.ttft_s)) is not None]
    figures: dict[str, float | int | None] = {
        "plain_ttft_s": median(one.plain.ttft_s for one in rounds),
        "plain_total_s": median(one.plain.total_s for one in rounds),
        "plain_drift": max(beside) / min(beside) if beside else None,
    }
    for result in results:
        if result.name == "bare":
            figures["bare_copy_s"] = of(result, tokens, lambda one: one.whole.ttft_s)
            continue
        figures[f"{result.name}_ttft_s"] = of(result, tokens, lambda one: one.whole.ttft_s)
        figures[f"{result.name}_total_s"] = of(result, tokens, lambda one: one.whole.total_s)
        figures[f"{result.name}_token_of_plain"] = of(
            result, tokens, lambda one: token_s(one.whole) / token_s(one.plain)
        )
        figures[f"{result.name}_decoder_ttft_s"] = of(result, tokens, lambda one: one.decoder_ttft_s)
        if result.name != "nixl":
            figures[f"{result.name}_reuse_ttft_s"] = of(
                result, tokens, lambda one: one.reuse.ttft_s if one.reuse else None
            )
    same = [float(one.plain.token_ids == one.whole.token_ids) for one in rounds]
    figures["same_tokens"] = statistics.fmean(same) if same else None
    return {"tokens": tokens, **{name: None if v is None else round(v, 4) for name, v in figures.items()}}


def print_system(result: SystemResult) -> None:
    """The system's table, one line a length, then where its time went; or why there is nothing."""
    print(f"\n== {result.name}")
    if result.problem:
        print(f"not measured: {result.problem}")
    if not result.rounds:
        return
    names = ("tokens", "plain", "ttft", "of plain", "total", "token", "of plain", "decoder", "reuse", "same")
    print("".join(f"{name:>10}" for name in names))
    for tokens, rounds in result.rounds.items():
        plain = of(result, tokens, lambda one: one.plain.ttft_s) or 0.0
        ttft = of(result, tokens, lambda one: one.whole.ttft_s) or 0.0
        cells = [
            f"{tokens}",
            f"{plain:.3f}",
            f"{ttft:.3f}",
            f"{ttft / plain:.3f}",
            _cell(of(result, tokens, lambda one: one.whole.total_s)),
            _cell(of(result, tokens, lambda one: token_s(one.whole))),
            _cell(of(result, tokens, lambda one: token_s(one.whole) / token_s(one.plain))),
            _cell(of(result, tokens, lambda one: one.decoder_ttft_s)),
            _cell(of(result, tokens, lambda one: one.reuse.ttft_s if one.reuse else None)),
            f"{sum(one.plain.token_ids == one.whole.token_ids for one in rounds)}/{len(rounds)}",
        ]
        print("".join(f"{cell:>10}" for cell in cells), flush=True)
    for tokens, rounds in result.rounds.items():
        for what, measured in (("whole", [one.whole for one in rounds]), ("reuse", [one.reuse for one in rounds])):
            spent = [one.spent for one in measured if one and one.spent]
            parts = {name: statistics.median(each.get(name, 0.0) for each in spent) for name in (spent or [{}])[0]}
            if parts:
                print(f"{tokens:>10} {what}: " + ", ".join(f"{name} {value:.4g}" for name, value in parts.items()))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
