"""Bounds and pauses of the UCX transport."""

from dataclasses import dataclass

from transfer.handover import HandoverLimits


@dataclass(frozen=True, slots=True)
class UcxLimits:
    """Of one worker, an initiator's or a host's."""

    handover: HandoverLimits = HandoverLimits()
    max_endpoints: int = 512
    """Connections of one process; the one that was idle longest is closed for a new one."""
    max_answers: int = 1024
    """Answers to greetings in UCX's hands at once; one more is not sent: who asks so fast does not read either."""
    batch_bytes: int = 32 << 20
    batch_requests: int = 256
    """Of one batch, in UCX's hands at once: what a batch that must end waits for."""
    all_bytes: int = 256 << 20
    all_requests: int = 4096
    """Of all batches: what UCX may come to hold of this process's memory, and of its own for requests."""
    spin_s: float = 60e-6
    """How long the thread looks before it sleeps: where batches are small, an answer or a peer's next message takes
    less than a sleep and a wake-up."""
    sleeps_without_spin: int = 8
    """Where nothing came in `spin_s`: so many sleeps before another try."""
    move_now_bytes: int = 64 << 10
    """Up to here a batch moves in its caller's thread, if it can: two hand-overs between threads take longer than it.
    """
    move_now_s: float = 200e-6
    """What such a batch may take of its caller's thread, before the worker's goes on with it."""
    tick_s: float = 0.05
    """While something must end by a time: how often to look."""
    connect_s: float = 5.0
    """A connection that is older without an answer, and on which a batch ended, is given up for a fresh one."""
    drain_s: float = 0.5
    """For batches to end in order before connections are cut."""
    settle_s: float = 2.0
    """For connections to be made before they are cut: UCX 1.13 aborts the *target's* process when its peer goes first.
    """
    close_s: float = 2.0
    """For UCX to let go of connections that were cut."""
    quiet_s: float = 0.03
    """A host that hears nothing for so long is closed."""
