"""What tells one life of the index from every other: generations that no earlier one gave out, on whichever machine.

Owns the record of the last life's first generation. A wall clock may be behind another machine's, or step back; a life
gives out fewer generations than stand between its first and the next one's.
"""

from kvcore.clock import Clock
from kvcore.errors import RecordsUnavailableError
from metadata_server.records.base import ABSENT, Guard, PutOutcome, Records

GENERATIONS = "generations"
_BITS_A_MS = 20
_OF_A_LIFE = 1 << 44


def by_clock(clock: Clock) -> int:
    """The first generation of a life that begins now, as far as the wall clock grows."""
    return int(clock.wall() * 1000) << _BITS_A_MS


async def first_generation(records: Records, clock: Clock, guard: Guard | None = None) -> int:
    """Of a life that begins now; above all of the lives before, whose servers had these records.

    Raises RecordsUnavailableError, and NotLeaderError if the guard does not hold."""
    while True:
        found = await records.get(GENERATIONS)
        last = int(found.value) if found is not None and found.value.isdigit() else 0
        first = max(by_clock(clock), last + _OF_A_LIFE if last else 0)
        expect = found.revision if found is not None else ABSENT
        reply = await records.put(GENERATIONS, str(first).encode(), expect=expect, guard=guard)
        if reply.outcome is PutOutcome.WRITTEN:
            return first


async def first_generation_alone(records: Records, clock: Clock) -> int:
    """The same for a server that has its records for itself: one that can write none begins all the same."""
    try:
        return await first_generation(records, clock)
    except RecordsUnavailableError:
        return by_clock(clock)
