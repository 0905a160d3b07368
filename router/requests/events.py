"""The words of a request's life: what happens to it (events) and what is to be done (actions). Values only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from kvcore.errors import DeadlineExceededError, KVFerryError
from nodeapi.messages import FinishReason, PrefillResult, TokenDelta, TokenLogprob
from nodeapi.prompt_logprobs import PromptLogprobs


class RequestTimer(StrEnum):
    """What a StartTimer is for; one of each may run."""

    HANDOFF = "handoff"
    SETTLE = "settle"
    RETRY = "retry"


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prefill leg replied."""

    leg: str
    result: PrefillResult


@dataclass(frozen=True, slots=True)
class PrefillFailed:
    """The prefill leg ended without result."""

    leg: str
    error: KVFerryError


class DeltaReceived(msgspec.Struct, frozen=True):
    """A decode leg sent something. As `Emit` of a kind that is made in a fifth of the time: there is one a token."""

    leg: str
    delta: TokenDelta


@dataclass(frozen=True, slots=True)
class DecodeFailed:
    """A decode leg broke off, or ended with indices unfinished."""

    leg: str
    error: KVFerryError


@dataclass(frozen=True, slots=True)
class LegStalled:
    """Nothing was heard of this leg, prefill or decode, for longer than its node should ever take."""

    leg: str
    error: KVFerryError


@dataclass(frozen=True, slots=True)
class StopHit:
    """The text of this index's first `num_tokens` tokens has a stop string, and that of fewer has none."""

    index: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody reads the answer any more."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The request's time is up. `why`: what it fails with, unless all that it lacks is its prefill leg's reply."""

    why: KVFerryError = field(default_factory=lambda: DeadlineExceededError("the request's time ran out"))


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A StartTimer ran out."""

    timer: RequestTimer


LegEvent = PrefillDone | PrefillFailed | DeltaReceived | DecodeFailed
RequestEvent = LegEvent | LegStalled | StopHit | ClientGone | DeadlinePassed | TimerFired


@dataclass(frozen=True, slots=True)
class StartPrefill:
    """Send the prefill leg to `node`; the chunks should lie with `decoder`."""

    leg: str
    node: str
    decoder: str


@dataclass(frozen=True, slots=True)
class KVSource:
    """The prefill leg (and its node) whose KV one decode leg fetches from the prefiller itself. `params`: what the
    prefill leg answered for it; empty while it runs."""

    leg: str
    node: str
    params: bytes = b""


@dataclass(frozen=True, slots=True)
class StartDecode:
    """Send a decode leg. `index` None: all completions from the start; else that one, after `output_token_ids`.

    `handoff`: a prefill leg is computing its chunks now, into the store. `source`: it fetches its KV itself.
    """

    leg: str
    node: str
    handoff: bool
    index: int | None = None
    output_token_ids: tuple[int, ...] = ()
    source: KVSource | None = None


@dataclass(frozen=True, slots=True)
class EndHandoff:
    """Tell this decode leg that no more chunks will come."""

    leg: str
    node: str


@dataclass(frozen=True, slots=True)
class CancelLeg:
    """Drop the leg's connection and abort it on its node. No event of this leg matters any more."""

    leg: str
    node: str


class Emit(msgspec.Struct, frozen=True):
    """Tokens for the client. `finish_reason` ends the index."""

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """Of the prompt's next tokens, and for all completions. With these come no tokens."""


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Report TimerFired after `after_s`."""

    timer: RequestTimer
    after_s: float


@dataclass(frozen=True, slots=True)
class Finish:
    """All indices ended: the answer is complete."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The answer will not be completed."""

    error: KVFerryError


Action = StartPrefill | StartDecode | EndHandoff | CancelLeg | Emit | StartTimer | Finish | Fail
