"""What the scheduler wants done in the next step. Values only."""

from dataclasses import dataclass, field

from engines.paged.runner import RowMove
from engines.paged.sequence import TokenSequence


@dataclass(frozen=True, slots=True)
class Work:
    """Compute `num_tokens` tokens of `sequence` from `start` on. One with holes may have several in a plan."""

    sequence: TokenSequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """Where its next token stands."""
        return self.start + self.num_tokens


@dataclass(slots=True)
class Plan:
    """What to do now. `loads` have become LOADING; `fully_cached` have nothing left to compute; `out_of_blocks`: a
    sequence cannot go on until a load or a save gives blocks back. `moves` come before the step, for
    documents: `fresh` are blocks of which no row means anything yet and not all get one, `sources` blocks with one
    reference more each until the step is closed."""

    work: list[Work] = field(default_factory=list)
    loads: list[TokenSequence] = field(default_factory=list)
    fully_cached: list[TokenSequence] = field(default_factory=list)
    out_of_blocks: bool = False
    moves: list[RowMove] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
