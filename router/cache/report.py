"""What `GET /v1/cache/stats` of the router says; `kvferry status` and `kvferry cache stat` read this same shape.

Readers ignore fields that they do not know; a field that is added has a default.
"""

from typing import Self

import msgspec


class CacheCounts(msgspec.Struct, kw_only=True):
    """Of the answered requests of some time, in prompt tokens. A request counts once, when it has ended, however often
    it was tried or moved. Invariant: `prompt_tokens` = `cached_tokens` + `last_chunk_tokens` + `gone_tokens` +
    `new_tokens` + `unknown_tokens`.
    """

    requests: int = 0
    unanswered: int = 0
    """Requests that failed or whose client left; nothing else of them is counted."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Not computed by any engine."""
    by_source: dict[str, int] = msgspec.field(default_factory=dict)
    """`cached_tokens`, by where they were: `engine` (its own prefix cache), `memory` (segments), or a tier's name."""
    last_chunk_tokens: int = 0
    """Known from an earlier prompt, but behind the last chunk that is known whole: a part of a chunk has no name."""
    gone_tokens: int = 0
    """In chunks that an earlier prompt had, and in no place where they could be used: evicted, late or never stored."""
    new_tokens: int = 0
    """In no earlier prompt behind the same beginning. The last token of a prompt is always here: it must be computed
    for its logits."""
    repeated_tokens: int = 0
    """Part of `new_tokens`, about: their text was in earlier prompts, but not behind the same beginning."""
    left_at: dict[int, int] = msgspec.field(default_factory=dict)
    """Prompts of whose new tokens at least half are repeated, by the token at which they leave all earlier prompts:
    exact below 64, then a power of two that it is not below."""
    unknown_tokens: int = 0
    """Not cached, and not looked at, as there were more prompts than the router looks at."""
    unused_tokens: int = 0
    """Brought from tiers into segments, and then not used by the engine. Not part of the sum."""
    hit_rate: float | None = None
    """`cached_tokens` / `prompt_tokens`; None: there were none."""

    def add(self, other: Self) -> None:
        """Count `other`'s too. `hit_rate` is left to `rated`."""
        self.requests += other.requests
        self.unanswered += other.unanswered
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.last_chunk_tokens += other.last_chunk_tokens
        self.gone_tokens += other.gone_tokens
        self.new_tokens += other.new_tokens
        self.repeated_tokens += other.repeated_tokens
        self.unknown_tokens += other.unknown_tokens
        self.unused_tokens += other.unused_tokens
        for source, tokens in other.by_source.items():
            self.by_source[source] = self.by_source.get(source, 0) + tokens
        for place, prompts in other.left_at.items():
            self.left_at[place] = self.left_at.get(place, 0) + prompts

    def rated(self) -> Self:
        """Itself, with its hit rate."""
        self.hit_rate = self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None
        return self

    def share(self, tokens: int) -> float:
        """Of the prompt tokens; 0 where there are none."""
        return tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def missed(self) -> dict[str, int]:
        """The tokens that were not cached, by why."""
        return {
            "last_chunk": self.last_chunk_tokens,
            "gone": self.gone_tokens,
            "new": self.new_tokens,
            "unknown": self.unknown_tokens,
        }

    @property
    def shares(self) -> dict[str, float]:
        """Of the prompt tokens, in the order in which people read them: each source, then each loss. Zeros are left
        out."""
        counts = {**dict(sorted(self.by_source.items())), **self.missed}
        return {name: self.share(tokens) for name, tokens in counts.items() if tokens}


class RoomPoint(msgspec.Struct, frozen=True, kw_only=True):
    """What the prompts of the last hour would have hit with so much room, beginning empty. None: unlimited."""

    times: float | None
    """Of the room that there is."""
    num_bytes: int | None
    hit_rate: float


class CacheStats(msgspec.Struct, kw_only=True):
    """The body of GET /v1/cache/stats."""

    minute: CacheCounts = msgspec.field(default_factory=CacheCounts)
    hour: CacheCounts = msgspec.field(default_factory=CacheCounts)
    start: CacheCounts = msgspec.field(default_factory=CacheCounts)
    """Since the router started."""
    chunk_tokens: int = 0
    """0: no node has said."""
    room_bytes: int = 0
    """Of all segments, or of the largest tier if that has more."""
    rooms: list[RoomPoint] = []
    """As of the last minute."""
    half_chunk_hit_rate: float | None = None
    """What chunks half as long would have hit, with the room that there is. None: not known, or half is no multiple of
    16 and of the engine's block."""
    warn_below: float = 0.0
    """`router.cache.warn_below`."""
    reason: str | None = None
    """Why the hit rate of the last hour is below that: `too_little_room`, `chunks_too_long`, `prompts_differ_early`,
    `not_kept` or `nothing_repeats`. None: it is not, or there is too little traffic to tell."""
    problem: str = ""
    """The same in words."""
