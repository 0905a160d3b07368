"""Several metadata servers in the test's own loop that share an index, and one client of them all."""

from dataclasses import replace
from typing import Any

import msgspec
from support.metadata_rigs import DirectTransport
from support.metadata_words import new_state, registration

from kvcore.clock import ManualClock
from kvcore.errors import MetadataUnavailableError
from kvcore.partitions import Part, Partitions
from kvnode.partitions.slices import of_part
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.partitions.client import PartitionedMetadataClient
from metadata_server.versions import SPOKEN


class PartTransport(DirectTransport):
    """The way to one partition. `away`: nothing answers; `deaf`: it acts, and its answers are lost."""

    away = deaf = False

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        if self.away:
            raise MetadataUnavailableError("away")
        reply = await super().call(path, body, timeout_s)
        if self.deaf:
            raise MetadataUnavailableError("the answer was lost")
        return reply


class PartitionRig:
    """`cores` and `ways` to them in the order of `names`; `client` asks them all."""

    def __init__(self, names: tuple[str, ...], **settings: Any) -> None:
        self.whole, self.clock = Partitions(names), ManualClock()
        self.parts = [Part(self.whole, number) for number in range(len(names))]
        self.cores = [
            MetadataCore(new_state(speaks=replace(SPOKEN, part=part), **settings), self.clock) for part in self.parts
        ]
        self.ways = [PartTransport(core) for core in self.cores]
        self.client = self.connect(self.whole)

    def connect(self, whole: Partitions) -> PartitionedMetadataClient:
        """A client that was started with this set."""
        clients = [
            MetadataClient(way, self.clock, 5.0, speaks=replace(SPOKEN, part=Part(whole, number)))
            for number, way in enumerate(self.ways)
        ]
        return PartitionedMetadataClient(clients, whole, self.clock)

    async def register(self, node_id: str, units: int) -> None:
        """A node with one segment, at all partitions."""
        request = registration(node_id, units, ttl_s=5.0)
        for part, client in zip(self.parts, self.client.parts, strict=True):
            manifests = [of_part(manifest, part) for manifest in request.segments]
            await client.register(msgspec.structs.replace(request, segments=manifests))

    def number(self, key: bytes) -> int:
        """The partition of a key."""
        return self.whole.number_of(key)  # type: ignore[arg-type]

    def check(self) -> None:
        """Every invariant of every state."""
        for core in self.cores:
            core.state.check_invariants(self.clock.now())
