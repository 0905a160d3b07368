"""Which requests came already: each sender counts its own, so a number and a row of bits remember them. Pure."""

from dataclasses import dataclass

from kvcore.trust.limits import ProofLimits


@dataclass(slots=True)
class _Sender:
    highest: int
    bits: int
    """Bit n: number `highest - n` was seen."""
    last_s: float
    first: int = 0
    """What is below it is not remembered any more."""


class SeenRequests:
    """Says once of each (sender, number) that it is new. What it no longer knows is not new.

    A sender that was silent for `forget_s` is forgotten: whoever asks refuses what is older than that by its time. It
    takes `max_seen_bytes` at most: at the bound the earliest numbers of who has most are no longer known.
    """

    def __init__(self, forget_s: float, limits: ProofLimits = ProofLimits()) -> None:
        self._forget_s = forget_s
        self._limits = limits
        self._mask = (1 << limits.window) - 1
        self._senders: dict[bytes, _Sender] = {}
        self._num_bits = 0

    def __repr__(self) -> str:
        return f"<SeenRequests of {len(self._senders)} senders, {self.num_bytes} bytes>"

    @property
    def num_bytes(self) -> int:
        """What it takes, about: Python keeps 30 bits of a number in 4 bytes."""
        return len(self._senders) * self._limits.sender_bytes + self._num_bits * 4 // 30

    def is_new(self, sender: bytes, number: int, now: float) -> bool:
        """Whether this is the first time; from now on it is not. Numbers grow, but may overtake each other."""
        known = self._senders.get(sender)
        if known is None:
            if len(self._senders) >= self._limits.max_senders and not self._forget(now):
                return False
            self._senders[sender] = _Sender(number, 1, now)
            self._num_bits += 1
            self._keep_bounded(now)
            return True
        ahead = number - known.highest
        if ahead > 0:
            had = known.bits.bit_length()
            known.bits = ((known.bits << ahead) | 1) & self._mask if ahead < self._limits.window else 1
            known.highest, known.last_s = number, now
            self._num_bits += known.bits.bit_length() - had
            self._keep_bounded(now)
            return True
        bit = 1 << -ahead if -ahead < self._limits.window else 0
        if not bit or number < known.first or known.bits & bit:
            return False
        self._num_bits += max(0, 1 - ahead - known.bits.bit_length())
        known.bits |= bit
        known.last_s = now
        self._keep_bounded(now)
        return True

    def _keep_bounded(self, now: float) -> None:
        """Down to three quarters, so that the next time is a while away: it looks at every sender."""
        if self.num_bytes <= self._limits.max_seen_bytes:
            return
        self._forget(now)
        left = self._limits.max_seen_bytes * 3 // 4 - len(self._senders) * self._limits.sender_bytes
        most = max(1, left * 30 // 4 // len(self._senders)) if self._senders else 0
        mask = (1 << most) - 1
        for sender in self._senders.values():
            if (had := sender.bits.bit_length()) > most:
                sender.bits &= mask
                sender.first = max(sender.first, sender.highest - most + 1)
                self._num_bits += sender.bits.bit_length() - had

    def _forget(self, now: float) -> bool:
        """Whether there is room now."""
        silent = [name for name, sender in self._senders.items() if now - sender.last_s > self._forget_s]
        for name in silent:
            self._num_bits -= self._senders.pop(name).bits.bit_length()
        return bool(silent)
