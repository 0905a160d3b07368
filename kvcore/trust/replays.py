"""Which requests came already: each sender counts its own, so a number and a row of bits remember them. Pure."""

from dataclasses import dataclass

from kvcore.trust.limits import ProofLimits


@dataclass(slots=True)
class _Sender:
    highest: int
    bits: int
    """Bit n: number `highest - n` was seen."""
    last_s: float


class SeenRequests:
    """Says once of each (sender, number) that it is new. What it no longer knows is not new.

    A sender that was silent for `forget_s` is forgotten: whoever asks refuses what is older than that by its time.
    """

    def __init__(self, forget_s: float, limits: ProofLimits = ProofLimits()) -> None:
        self._forget_s = forget_s
        self._limits = limits
        self._mask = (1 << limits.window) - 1
        self._senders: dict[bytes, _Sender] = {}

    def __repr__(self) -> str:
        return f"<SeenRequests of {len(self._senders)} senders>"

    def is_new(self, sender: bytes, number: int, now: float) -> bool:
        """Whether this is the first time; from now on it is not. Numbers grow, but may overtake each other."""
        known = self._senders.get(sender)
        if known is None:
            if len(self._senders) >= self._limits.max_senders and not self._forget(now):
                return False
            self._senders[sender] = _Sender(number, 1, now)
            return True
        ahead = number - known.highest
        if ahead > 0:
            known.bits = ((known.bits << ahead) | 1) & self._mask if ahead < self._limits.window else 1
            known.highest, known.last_s = number, now
            return True
        bit = 1 << -ahead if -ahead < self._limits.window else 0
        if not bit or known.bits & bit:
            return False
        known.bits |= bit
        known.last_s = now
        return True

    def _forget(self, now: float) -> bool:
        """Whether there is room now."""
        silent = [name for name, sender in self._senders.items() if now - sender.last_s > self._forget_s]
        for name in silent:
            del self._senders[name]
        return bool(silent)
