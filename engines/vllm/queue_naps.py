"""Makes vLLM's processes sleep between two looks at their message queues, instead of spinning. For CPUs only.

The names that are replaced are those of vLLM 0.32 and 0.33; a test holds them against the one that is installed.
"""

import time
from dataclasses import dataclass

from vllm.distributed.device_communicators import shm_broadcast

_vllms_wait = shm_broadcast.SpinCondition.wait


@dataclass(frozen=True, slots=True)
class Naps:
    """How long a reader or writer of a queue sleeps at once."""

    shortest_s: float = 20e-6
    """The kernel makes about 0.1 ms of it."""
    longest_s: float = 500e-6


def wait_without_spinning(naps: Naps = Naps()) -> None:
    """Let this process sleep where vLLM calls sched_yield for a second after each message.

    On a CPU, engines share cores. Linux 6.18 was seen to keep a group of processes that spins so (a process group, a
    container) on its core for minutes while another's computing threads were ready to run; docs/vllm.md describes the
    symptoms.

    There are three cases of waiting:

    1. A reader, up to a second (vLLM's `busy_loop_s`) after the last message. It sleeps a 32nd of the time that has
       passed since that message, within `naps`: the longer the pause so far, the less a late wake-up matters.
    2. A reader after that second. vLLM waits for the queue's notification, and this stays so. A notification is not
       used in case 1, because one that follows another within a millisecond may be lost (its socket has room for one,
       and learns late that it was read), which costs five seconds.
    3. A writer while its ring is full. It sleeps `naps.shortest_s`.
    """

    def wait(condition: shm_broadcast.SpinCondition, timeout_ms: int | None = None) -> None:
        idle_s = time.monotonic() - condition.last_read
        if idle_s <= condition.busy_loop_s:
            time.sleep(min(max(idle_s / 32, naps.shortest_s), naps.longest_s))
        else:
            _vllms_wait(condition, timeout_ms)

    def nap() -> None:
        time.sleep(naps.shortest_s)

    shm_broadcast.SpinCondition.wait = wait
    shm_broadcast.sched_yield = nap
