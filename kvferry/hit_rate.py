"""The hit rate in tokens as people read it, from what the router's `/v1/cache/stats` says. Pure."""

from collections.abc import Iterator

from rich.table import Table

from router.cache.report import CacheCounts, CacheStats

_COLUMNS = {"last_chunk": "last chunk"}


def hit_rate_lines(stats: CacheStats) -> Iterator[Table | str]:
    """A line, and a table of the last minute, the last hour and since start. Nothing before the first answer."""
    if not stats.start.requests:
        return
    spans = {"1 min": stats.minute, "1 h": stats.hour, "start": stats.start}
    yield hit_rate_table(spans)
    recent = bool(stats.hour.requests)
    name, counts = ("the last hour", stats.hour) if recent else ("all requests since start", stats.start)
    shares = ", ".join(f"{_COLUMNS.get(key, key)} {share:.1%}" for key, share in counts.shares.items())
    yield f"hit rate: {counts.hit_rate or 0.0:.1%} of the prompt tokens of {name} ({shares})"


def hit_rate_table(spans: dict[str, CacheCounts]) -> Table:
    """A row a span; a column each for where cached tokens were, and for why others were not cached."""
    columns = list(dict.fromkeys(name for counts in spans.values() for name in counts.shares))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("cache", "requests", "prompt tokens", "hit rate", *(_COLUMNS.get(name, name) for name in columns)):
        table.add_column(heading)
    for span, counts in spans.items():
        shares = [f"{counts.shares[name]:.1%}" if name in counts.shares else "" for name in columns]
        rate = "" if counts.hit_rate is None else f"{counts.hit_rate:.1%}"
        table.add_row(span, str(counts.requests), str(counts.prompt_tokens), rate, *shares)
    return table
