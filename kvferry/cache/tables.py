"""What the router's answers look like in a terminal. Pure but for the clock that ages are counted from."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from kvferry.cache.inputs import GivenPrompt
from kvferry.machine import size_text
from router.upkeep.reports import (
    ClearReport,
    GenerationLine,
    GenerationsReport,
    LookupReply,
    OrderReply,
    PlaceCount,
    PromptWarmed,
)

SHORT = 12
"""Digits of a fingerprint that are shown; the commands take any beginning."""


def table(*headings: str) -> Table:
    """A plain one."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        made.add_column(heading)
    return made


def generations_table(report: GenerationsReport, now: float) -> Table:
    """A row a generation. `now`: Unix seconds."""
    made = table("generation", "state", "chunks by place", "used", "what")
    for line in report.generations:
        places = ", ".join(
            f"{place.place}{f' {place.node}' if place.node else ''} {place.chunks} ({size_text(place.num_bytes)})"
            for place in line.places
        )
        made.add_row(line.fingerprint[:SHORT], _state(line), places or "none", _used(line, now), line.note)
    return made


def _state(line: GenerationLine) -> str:
    if line.marks:
        return f"{line.state}, by {line.marks[0].owner}"
    return line.state


def _used(line: GenerationLine, now: float) -> str:
    if line.newest_use is None or line.oldest_use is None:
        return ""
    return f"{age_text(now - line.newest_use)} to {age_text(now - line.oldest_use)} ago"


def age_text(seconds: float) -> str:
    """`3 min`."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def lookup_table(prompts: Sequence[GivenPrompt], replies: Sequence[LookupReply]) -> Table:
    """A row a prompt."""
    made = table("prompt", "tokens", "in memory", "in tiers", "new", "where")
    for prompt, reply in zip(prompts, replies, strict=True):
        for line in reply.prompts:
            where = [f"{node} {tokens}" for node, tokens in line.memory.items()]
            where += [f"{one.tier}{f' of {one.node}' if one.node else ''} {one.tokens}" for one in line.tiers]
            counts = (line.tokens, line.memory_tokens, line.tier_tokens, line.new_tokens)
            made.add_row(prompt.source, *(str(count) for count in counts), ", ".join(where))
    return made


def warmed_line(source: str, line: PromptWarmed) -> str:
    """One prompt of a warm-up."""
    full = ", the store was full" if line.no_room else ""
    return (
        f"{source}: {line.tokens} tokens, {line.cached_tokens} cached, {line.computed_tokens} computed, "
        f"{line.stored_tokens} in the store{full} ({line.node}, {line.seconds:.1f} s)"
    )


def places_lines(places: Sequence[PlaceCount], did: str) -> Iterator[str]:
    """A line a place that had some."""
    for place in places:
        if place.chunks:
            of = f" of {place.node}" if place.node else ""
            yield f"{place.place}{of}: {place.chunks} chunks {did}"


def order_lines(did: str, replies: Sequence[OrderReply]) -> Iterator[str]:
    """What became of an order, over all bodies."""
    total: dict[tuple[str, str], PlaceCount] = {}
    for reply in replies:
        for place in reply.places:
            new = PlaceCount(place=place.place, node=place.node, chunks=0)
            total.setdefault((place.place, place.node), new).chunks += place.chunks
    prompts, chunks = sum(one.prompts for one in replies), sum(one.chunks for one in replies)
    yield f"prompts: {prompts}, full chunks: {chunks}"
    yield from places_lines(list(total.values()), did)


def clear_lines(report: ClearReport) -> Iterator[str]:
    """What was cleared and what was kept."""
    yield f"generations cleared: {len(report.cleared)}" if report.cleared else "nothing to clear"
    yield from places_lines(report.places, "removed")
    for fingerprint, why in report.kept.items():
        yield f"kept {fingerprint[:SHORT]}: {why}"
