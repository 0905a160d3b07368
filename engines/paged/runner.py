"""What the shared loop needs of a model: run one ragged step over paged KV, and show the bytes of a block."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nodeapi.grammars.matcher import GrammarMatcher, Mask
from nodeapi.messages import EngineInfo, TokenLogprob
from nodeapi.prompt_logprobs import PromptLogprobs
from nodeapi.sampling import SamplingParams

PAGED_LACKS = ["extra_args", "thinking_token_budget"]
"""Fields of SamplingParams that engines over the shared loop do not obey (`EngineInfo.lacks`)."""


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Sample after the slice's last token. `indices`: which completions of the request draw here (several after an
    unforked prompt, n > 1). `prompt` and `output` are what the penalties look at; `len(output)` is the position."""

    params: SamplingParams
    indices: tuple[int, ...]
    prompt: Sequence[int]
    output: Sequence[int]
    whole: bool = False
    """Whether the whole distribution is wanted, before temperature and penalties."""
    matcher: GrammarMatcher | None = None
    """What must be asked which tokens may come; None: all may."""

    def mask(self, eos_token_ids: Sequence[int]) -> Mask | None:
        """[vocabulary], True for each token that may be drawn. None: all may; of one whose matcher has a `problem` now,
        none may. Blocking, with a grammar."""
        if self.matcher is None:
            return None
        params = self.params
        ends = [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]
        return self.matcher.mask(self.output, ends, may_end=len(self.output) >= params.min_tokens)


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """Tell the logprobs of `targets`, tokens of a prompt: `targets[i]` is what follows the slice's token `first + i`.
    `top`: so many of the likeliest ones in the place of each."""

    first: int
    targets: Sequence[int]
    top: int


@dataclass(frozen=True, slots=True)
class StepSlice:
    """New tokens of one sequence: `token_ids[i]` stands at position `start + i`; the KV of positions before `start` is
    in the blocks already. Position p lives in `block_table[p // block_size]` at row `p % block_size`.

    A step may have several slices of one sequence, in order: each sees what those before it write."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sample: SampleSpec | None = None
    keeps_rest: bool = False
    """Rows behind the slice, in the block that it ends in, have KV already, or zeros."""
    score: ScoreSpec | None = None
    adapter: str = ""
    """The identity of the adapter that computes it; empty: the model alone."""


@dataclass(frozen=True, slots=True)
class RowMove:
    """Copy KV of `count` tokens, row by row, and turn it from the positions that it was computed at, `computed_at` on,
    to those from `position` on. Row r of a list of blocks is row `r % block_size` of block `r // block_size`."""

    source: Sequence[int]
    source_row: int
    computed_at: int
    target: Sequence[int]
    target_row: int
    position: int
    count: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token."""

    token_id: int
    logprob: TokenLogprob | None = None
    distribution: npt.NDArray[np.float32] | None = None
    """Logarithms of the probabilities of the whole vocabulary, where the spec wanted it whole."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """`samples[i]`: one a requested index of slice i's SampleSpec, in order; empty where it had none, and where the
    model's logits for it were not numbers. `scores[i]`: what its ScoreSpec asked for; None likewise."""

    samples: list[list[Sampled]] = field(default_factory=list)
    scores: list[PromptLogprobs | None] = field(default_factory=list)


class ModelRunner(Protocol):
    """A model over `num_blocks` blocks of KV. One `execute` at a time."""

    @property
    def info(self) -> EngineInfo:
        """Never changes."""
        ...

    @property
    def memory(self) -> memoryview:
        """All that `block_view` shows, and no more; stays where it is for as long as the runner lives."""
        ...

    async def execute(self, slices: Sequence[StepSlice]) -> StepOutput:
        """Run one step: at least one slice, each with at least one token. Writes the slices' KV into their blocks."""
        ...

    async def move(self, moves: Sequence[RowMove], fresh: Sequence[int]) -> None:
        """Zero the blocks `fresh`, then make the moves. Not while a step is under way that has their blocks. Raises
        EngineError where the engine says that it refuses documents."""
        ...

    async def distance(self, blocks: Sequence[int], others: Sequence[int]) -> float:
        """The largest difference of K, or of V, between full blocks that hold the same tokens, in units of the largest
        number in `blocks`. Infinite where one is no number."""
        ...

    def block_view(self, block_id: int) -> memoryview:
        """The bytes of one block, writable, contiguous, always at the same address; opaque to callers."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block (a fork's partial last block)."""
        ...

    async def aclose(self) -> None:
        """Release model and memory."""
        ...
