"""Somebody in a simulated cluster who reaches every segment and every tier and has not the cluster's secret.

Reads what lies there, keeps it, and puts chunks back that it has made of them (`support.chunk_attacks`).
"""

import asyncio
import random
from collections import deque

from support.chunk_attacks import ATTACKS
from support.sim_network import Trace
from support.sim_nodes import SimSetup

from kvstore.chunk_format import HEADER_BYTES, parse
from kvstore.manifest import scan


class Adversary:
    """`run` it in a task, for as long as it is there."""

    def __init__(self, setup: SimSetup, trace: Trace, seed: int) -> None:
        self._setup, self._trace, self._dice = setup, trace, random.Random(seed)
        self._stolen: deque[bytes] = deque(maxlen=64)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._dice.uniform(0.0, 0.01))
            if self._setup.tiers is not None and self._dice.random() < 0.3:
                self._in_a_tier()
            else:
                self._in_a_segment()

    def _in_a_segment(self) -> None:
        memories = list(self._setup.memory.values())
        if not memories:  # every node is away
            return
        memory = self._dice.choice(memories)
        if found := scan(memory):
            entry = self._dice.choice(found)
            place = memory[entry.offset : entry.offset + entry.length]
            place[:] = self._made_of(bytes(place))

    def _in_a_tier(self) -> None:
        assert self._setup.tiers is not None
        media = list(self._setup.tiers.media().values())
        if not media:
            return
        medium = self._dice.choice(media)
        if medium.memory.chunks:
            name = self._dice.choice(list(medium.memory.chunks))
            value, end = medium.memory.chunks[name]
            header = parse(value)
            if header is not None and len(value) == HEADER_BYTES + header.payload_length:
                medium.whole = False
                medium.memory.chunks[name] = self._made_of(value), end

    def _made_of(self, there: bytes) -> bytes:
        """As long as it was."""
        name, others = self._dice.choice(list(ATTACKS)), [one for one in self._stolen if len(one) == len(there)]
        other = self._dice.choice(others) if others else there
        self._stolen.append(there)
        self._trace(f"attack_{name}")
        return ATTACKS[name].change(there, other)
