"""What the ledger keeps of each completion and of each decode leg that serves some of them. State and what follows
from it alone; `router.requests.ledger` changes it."""

from dataclasses import dataclass, field

from nodeapi.messages import FinishReason
from router.requests.events import KVSource


@dataclass(slots=True)
class Completion:
    """One of the n answers. `tries`: legs begun since it last got anywhere."""

    tokens: list[int] = field(default_factory=list)
    finished: FinishReason | None = None
    tries: int = 0

    def end_reached(self, max_tokens: int, min_tokens: int, end_token_ids: frozenset[int]) -> FinishReason | None:
        """How it would have ended if its leg died between its last token and its finish reason."""
        if self.tokens and self.tokens[-1] in end_token_ids and len(self.tokens) > min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= max_tokens else None


@dataclass(slots=True)
class DecodeLeg:
    """A decode leg under way. `index` None: it serves all completions; else that one, as its index 0. `open`: those
    that it has not ended yet."""

    node: str
    index: int | None
    open: set[int]
    handoff: bool
    source: KVSource | None
    started: bool = False
    """It has spoken."""
    followers: set[int] = field(default_factory=set)
    """Indices whose legs start once this one has spoken."""

    @property
    def fetches(self) -> bool:
        """Whether it may still be waiting for KV from its prefiller."""
        return self.source is not None and not self.started

    @property
    def waits(self) -> bool:
        """Whether it may still be waiting for what a prefill leg computes."""
        return not self.started and (self.handoff or self.source is not None)
