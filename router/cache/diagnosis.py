"""Why the hit rate is low, in one sentence with what to do. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from router.cache.advice import size_words
from router.cache.divergence import where_most_leave
from router.cache.limits import WatchLimits
from router.cache.report import CacheCounts, CacheStats


class MissReason(StrEnum):
    """What most of the hit rate is lost to, of what can be helped."""

    TOO_LITTLE_ROOM = "too_little_room"
    CHUNKS_TOO_LONG = "chunks_too_long"
    PROMPTS_DIFFER_EARLY = "prompts_differ_early"
    NOT_KEPT = "not_kept"
    """What earlier prompts had was not there, though there was room."""
    NOTHING_REPEATS = "nothing_repeats"
    """Nothing can be helped: the prompts have little in common."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`tokens`: the share of the prompt tokens that are lost so. `sentence`: of it, without the hit rate itself."""

    reason: MissReason
    tokens: float
    sentence: str


def diagnose(stats: CacheStats, limits: WatchLimits = WatchLimits()) -> Diagnosis | None:
    """Of the last hour; None: its hit rate is not below `warn_below`, or it had too few requests to tell.

    Of the losses that can be helped the largest one counts, if it is one worth a word.
    """
    hour = stats.hour
    if hour.requests < limits.min_requests or hour.hit_rate is None or hour.hit_rate >= stats.warn_below:
        return None
    found = [one for one in _losses(stats, limits) if one.tokens >= limits.min_share]
    new = hour.share(hour.new_tokens - hour.repeated_tokens)
    nothing = f"{new:.0%} were in no earlier prompt, so that there is little to reuse"
    return max(found, key=lambda one: one.tokens, default=Diagnosis(MissReason.NOTHING_REPEATS, new, nothing))


def told(stats: CacheStats, diagnosis: Diagnosis) -> str:
    """The whole sentence."""
    rate = stats.hour.hit_rate or 0.0
    hour = f"the hit rate of the last hour is {rate:.0%} of the prompt tokens, below {stats.warn_below:.0%}"
    return f"{hour}: {diagnosis.sentence}"


def _losses(stats: CacheStats, limits: WatchLimits) -> Iterator[Diagnosis]:
    hour = stats.hour
    yield _gone(stats, limits)
    last_chunk = hour.share(hour.last_chunk_tokens)
    shorter = ""
    if stats.half_chunk_hit_rate is not None:
        shorter = f"; chunks of {stats.chunk_tokens // 2} would have hit {stats.half_chunk_hit_rate:.0%} in all"
    yield Diagnosis(
        MissReason.CHUNKS_TOO_LONG,
        last_chunk,
        f"{last_chunk:.0%} were in earlier prompts, but behind their last whole chunk of {stats.chunk_tokens} tokens"
        f"{shorter} (kv.chunk_tokens)",
    )
    repeated = hour.share(hour.repeated_tokens)
    share, within, at = where_most_leave(hour.left_at)
    yield Diagnosis(
        MissReason.PROMPTS_DIFFER_EARLY,
        repeated if share else 0.0,
        f"{repeated:.0%} were in earlier prompts, but behind another beginning. {_of_all(hour, share)} of the prompts "
        f"differ from every earlier one within their first {within} tokens, most often at token {at + 1} (a date or an "
        "id near the start? What changes belongs at the end)",
    )


def _of_all(hour: CacheCounts, share: float) -> str:
    return f"{share * sum(hour.left_at.values()) / max(1, hour.requests):.0%}"


def _gone(stats: CacheStats, limits: WatchLimits) -> Diagnosis:
    gone = stats.hour.share(stats.hour.gone_tokens)
    rates = {point.times: point.hit_rate for point in stats.rooms}
    if not rates or max(rates[2], rates[4]) - rates[1] < limits.min_share:
        helps = ", and more room would not have helped" if rates else ""
        return Diagnosis(
            MissReason.NOT_KEPT,
            gone,
            f"{gone:.0%} were in earlier prompts and were not found{helps}: they came late, were never stored or had "
            "to go (see chunk_miss_, no_room, dropped and evicted among the counters in docs/troubleshoot.md)",
        )
    return Diagnosis(
        MissReason.TOO_LITTLE_ROOM,
        gone,
        f"{gone:.0%} were in earlier prompts and had to go. With {size_words(stats.room_bytes)} of room these prompts "
        f"hit {rates[1]:.0%}, with twice as much {rates[2]:.0%}, with four times {rates[4]:.0%} (nodes.*.segment, "
        "tiers)",
    )
