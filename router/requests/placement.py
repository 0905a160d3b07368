"""Completions that need another decoder: which decoders are avoided, and which completions wait for one to be there."""

from router.requests.events import RequestTimer, StartTimer
from router.requests.limits import RequestLimits
from router.requests.prefill_half import Picker


class DecoderPlacement:
    """Of one request. Pure, as the ledger is."""

    def __init__(self, picker: Picker, limits: RequestLimits) -> None:
        self._picker = picker
        self._limits = limits
        self._failed: set[str] = set()
        self._waited_s = 0.0
        self.unplaced: set[int] = set()
        """Indices of the completions that wait."""

    @property
    def out_of_patience(self) -> bool:
        """Whether the request has waited as long as it may, over all its waits."""
        return self._waited_s >= self._limits.patience_s

    def avoid(self, node: str) -> None:
        """A leg on this decoder failed by its own fault."""
        self._failed.add(node)

    def decoder(self) -> str | None:
        """One that is usable and not avoided."""
        return self._picker.decoder(frozenset(self._failed))

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
        return unplaced
