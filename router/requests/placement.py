"""Completions that need another decoder: which decoders are avoided, which may go on with an answer that has begun, and
which completions wait for one to be there. Where no decoder can, a prefiller is one (`router.routing.policy`).
"""

from kvcore.errors import (
    CancelledByPeerError,
    EngineError,
    KVFerryError,
    ModelChangedError,
    NodeUnavailableError,
    OverloadedError,
)
from nodeapi.messages import TokenDelta
from router.requests.decode_legs import DecodeLeg
from router.requests.events import RequestTimer, StartTimer
from router.requests.limits import RequestLimits
from router.requests.prefill_half import Picker


class DecoderPlacement:
    """Of one request. Pure, as the ledger is. Invariant: all tokens of an answer come from engines of one fingerprint,
    that of the first; empty, it is not known, or there is no token yet."""

    def __init__(self, picker: Picker, limits: RequestLimits) -> None:
        self._picker = picker
        self._limits = limits
        self._failed: set[str] = set()
        self._full: set[str] = set()
        self._waited_s = 0.0
        self._fingerprint = b""
        self._had_one_more = False
        self.unplaced: set[int] = set()
        """Indices of the completions that wait."""

    @property
    def out_of_patience(self) -> bool:
        """Whether the request has waited as long as it may, over all its waits."""
        return self._waited_s >= self._limits.patience_s

    def failed(self, leg: DecodeLeg, error: KVFerryError) -> KVFerryError:
        """Why this leg failed. Its node is avoided from here on, unless it may be innocent: an engine that could not
        fetch its KV may have been wronged by its prefiller."""
        if isinstance(error, CancelledByPeerError):  # somebody did, but not this router
            error = NodeUnavailableError(f"node {leg.node} gave the request up: {error.message}")
        if not (leg.fetches and isinstance(error, EngineError)):
            self._failed.add(leg.node)
            if isinstance(error, OverloadedError):
                self._full.add(leg.node)
        return error

    def decoder(self) -> str | None:
        """One that is usable, not avoided and of the model that the answer began with."""
        return self._picker.decoder(frozenset(self._failed), self._fingerprint, frozenset(self._full))

    def could_leave(self, node: str) -> bool:
        """Whether there is another one to go to."""
        avoided = frozenset({*self._failed, node})
        return self._picker.decoder(avoided, self._fingerprint, frozenset(self._full)) is not None

    def model_changed(self, leg: DecodeLeg, delta: TokenDelta) -> ModelChangedError | None:
        """Why this delta, of a leg whose fingerprint is known, cannot be part of the answer; None: it can be, and from
        its first token on no other model."""
        if delta.token_ids and not self._fingerprint:
            self._fingerprint = leg.fingerprint
        if leg.fingerprint == self._fingerprint or not self._fingerprint:
            return None
        return ModelChangedError(f"node {leg.node} has other weights or settings than the answer began with")

    def one_more(self, last_error: KVFerryError) -> bool:
        """Whether completions whose tries are used up are tried once more, after a pause: nodes went away under them
        one after the other, as all of a cluster do that goes down. In the pause it is found out which of them are
        there. A request has this once: where it is the request that kills them, it kills no more than one more."""
        if self._had_one_more or last_error.code != NodeUnavailableError.code:
            return False
        self._had_one_more = True
        return True

    def why_none(self, last_error: KVFerryError) -> KVFerryError:
        """The failure of a request for which there was no decoder. `last_error`: how it lost its last one."""
        of_the_model = self._picker.decoder(frozenset(), self._fingerprint, frozenset())
        other = self._picker.decoder(frozenset(), b"", frozenset())
        if of_the_model is not None or other is None or isinstance(last_error, ModelChangedError):
            return last_error
        return ModelChangedError(
            f"{last_error.message}; no node has the weights and settings that the answer began with any more: node "
            f"{other} has others"
        )

    def wait(self, indices: set[int]) -> list[StartTimer]:
        """These completions wait. One timer is enough for all that do."""
        timer_runs = bool(self.unplaced)
        self.unplaced |= indices
        if timer_runs:
            return []
        self._waited_s += self._limits.retry_pause_s
        return [StartTimer(RequestTimer.RETRY, self._limits.retry_pause_s)]

    def take_unplaced(self) -> set[int]:
        """The timer fired: those that waited. Where there are some, no decoder is avoided any more."""
        unplaced, self.unplaced = self.unplaced, set()
        if unplaced:
            self._failed.clear()
            self._full.clear()
        return unplaced
