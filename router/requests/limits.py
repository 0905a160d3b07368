"""The limits and pauses of a request's life, in one struct that tests may change. Values only."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Seconds, and counts. What an operator sets (timeouts of a request, of a prefill) is in RouterConfig."""

    stall_s: float = 30.0
    """A stream that has begun and then says nothing for this long is dead (an engine's step takes far less)."""
    most_stalls: int = 2
    """Times that a request goes on elsewhere because a node was silent, each time after twice as long."""
    control_timeout_s: float = 2.0
    """Of an abort, or of the word that ends a handoff."""
    max_unread: int = 256
    """Deltas that wait for a slow client before the node is read no further."""
    max_rows: int = 8192
    """Tokens that one step of all requests brings, logprobs of others included: 30 µs of the event loop each."""
    max_scores: int = 1 << 22
    """Logprobs of prompts' tokens that the answers of all requests name: 50 bytes each until they are sent."""
    handoff_grace_s: float = 0.25
    """After a prefill that stored everything, a decoder should find it by itself; else it is told to stop waiting."""
    handoff_longest_s: float = 2.0
    """The pause between two such words doubles up to this."""
    settle_s: float = 1.0
    """How long the end of a request waits for the reply of a prefill that its decoder overtook."""
    retry_pause_s: float = 0.25
    """Between two looks for a decoder while there is none."""
    patience_s: float = 15.0
    """How long a request that was accepted waits for some node that can decode to come back. A node that starts anew
    needs `service.start_s`: see `waiting_for_start`."""

    def waiting_for_start(self, start_s: float) -> "RequestLimits":
        """These, with the patience for a node that takes `start_s` to start."""
        return replace(self, patience_s=max(self.patience_s, start_s))
