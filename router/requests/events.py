"""The words of a request's life: what happens to it (events) and what is to be done (actions). Values only, of a kind
that is made in a fifth of a dataclass's time: there is one a token.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from kvcore.errors import KVFerryError
from nodeapi.messages import FinishReason, PrefillResult, TokenDelta, TokenLogprob
from nodeapi.prompt_logprobs import PromptLogprobs


class RequestTimer(StrEnum):
    """What a StartTimer is for; one of each may run."""

    HANDOFF = "handoff"
    SETTLE = "settle"
    RETRY = "retry"


class PrefillDone(msgspec.Struct, frozen=True):
    """The prefill leg replied."""

    leg: str
    result: PrefillResult


class PrefillFailed(msgspec.Struct, frozen=True):
    """The prefill leg ended without result."""

    leg: str
    error: KVFerryError


class DeltaReceived(msgspec.Struct, frozen=True):
    """A decode leg sent something."""

    leg: str
    delta: TokenDelta


class DecodeFailed(msgspec.Struct, frozen=True):
    """A decode leg broke off, or ended with indices unfinished. `lost`: with all else on a node that is silent, so that
    it does not count as a try of this request."""

    leg: str
    error: KVFerryError
    lost: bool = False


class LegStalled(msgspec.Struct, frozen=True):
    """Nothing was heard of this leg, prefill or decode, for longer than its node should ever take."""

    leg: str
    error: KVFerryError


class StopHit(msgspec.Struct, frozen=True):
    """The text of this index's first `num_tokens` tokens has a stop string, and that of fewer has none."""

    index: int
    num_tokens: int


class ClientGone(msgspec.Struct, frozen=True):
    """Nobody reads the answer any more."""


class DeadlinePassed(msgspec.Struct, frozen=True):
    """The request's time is up. `why`: what it fails with, unless all that it lacks is its prefill leg's reply; None:
    its own time ran out."""

    why: KVFerryError | None = None


class TimerFired(msgspec.Struct, frozen=True):
    """A StartTimer ran out."""

    timer: RequestTimer


LegEvent = PrefillDone | PrefillFailed | DecodeFailed
OtherEvent = LegEvent | LegStalled | StopHit | ClientGone | DeadlinePassed | TimerFired
RequestEvent = DeltaReceived | OtherEvent


class StartPrefill(msgspec.Struct, frozen=True):
    """Send the prefill leg to `node`; the chunks should lie with `decoder`."""

    leg: str
    node: str
    decoder: str


class KVSource(msgspec.Struct, frozen=True):
    """The prefill leg (and its node) whose KV one decode leg fetches from the prefiller itself. `params`: what the
    prefill leg answered for it; empty while it runs."""

    leg: str
    node: str
    params: bytes = b""


class StartDecode(msgspec.Struct, frozen=True):
    """Send a decode leg. `index` None: all completions from the start; else that one, after `output_token_ids`.

    `handoff`: a prefill leg is computing its chunks now, into the store. `source`: it fetches its KV itself.
    """

    leg: str
    node: str
    handoff: bool
    index: int | None = None
    output_token_ids: tuple[int, ...] = ()
    source: KVSource | None = None


class EndHandoff(msgspec.Struct, frozen=True):
    """Tell this decode leg that no more chunks will come."""

    leg: str
    node: str


class CancelLeg(msgspec.Struct, frozen=True):
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


class StartTimer(msgspec.Struct, frozen=True):
    """Report TimerFired after `after_s`."""

    timer: RequestTimer
    after_s: float


class Finish(msgspec.Struct, frozen=True):
    """All indices ended: the answer is complete."""


class Fail(msgspec.Struct, frozen=True):
    """The answer will not be completed."""

    error: KVFerryError


Action = StartPrefill | StartDecode | EndHandoff | CancelLeg | Emit | StartTimer | Finish | Fail
