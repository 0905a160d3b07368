"""Several simulated metadata servers that share the index, in the place of one.

Each is a `SimMetadata` on a host of its own; they are killed in turn, one at a time.
"""

from collections import Counter
from itertools import cycle, pairwise

from support.sim_network import SimProcess
from support.sim_nodes import SimMetadata, SimSetup, SinkOf, Subscription
from support.sim_ways import METADATA

from kvcore.partitions import Part, Partitions
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.partitions.client import PartitionedMetadataClient
from metadata_server.partitions.subscription import PartitionedSubscription
from metadata_server.subscription import IndexSubscription


class SimPartitions(SimMetadata):
    """As one server to the cluster: it is alive while all are."""

    def __init__(self, setup: SimSetup, count: int) -> None:
        super().__init__(setup)
        self.whole = Partitions(tuple("abc"[:count]))
        self.each = [
            SimMetadata(setup, Part(self.whole, number), f"{METADATA}-{number}" if number else METADATA)
            for number in range(count)
        ]
        self.problems = set[str]()
        self._clients: list[PartitionedMetadataClient] = []
        self._victims = cycle(reversed(self.each))

    @property
    def alive(self) -> bool:
        return all(one.alive for one in self.each)

    @property
    def cores(self) -> list[MetadataCore]:
        return [one.core for one in self.each]

    @property
    def counts(self) -> Counter[str]:
        return sum((one.counts for one in self.each), Counter())

    @counts.setter
    def counts(self, counts: Counter[str]) -> None:
        assert not counts, "each has its own"

    def start(self) -> None:
        """A new life of those that are dead."""
        for one in self.each:
            if not one.alive:
                one.clock_off_s = self.clock_off_s
                one.start()

    def kill(self) -> None:
        """One of them, with its state."""
        victim = next(self._victims)
        self._setup.network.trace("killed_partition", victim.host)
        victim.kill()

    def end(self) -> None:
        """All of them."""
        for one in self.each:
            one.kill()

    async def gone(self) -> None:
        for client in self._clients:
            await client.aclose()
        for one in self.each:
            await one.gone()

    def check(self) -> None:
        """Every invariant of each, and that no two have given out the same bytes."""
        taken: dict[str, list[tuple[int, int]]] = {}
        for one in self.each:
            one.check()
            for record in one.core.state._nodes.segments.values() if one.alive else ():
                space = record.allocator
                taken.setdefault(record.segment.id, []).append((space.start, space.end))
        for extents in taken.values():
            ordered = sorted(extents)
            if any(before[1] > after[0] for before, after in pairwise(ordered)):
                self.problems.add(f"two partitions may give out the same bytes: {ordered}")

    def connect(self, process: SimProcess) -> MetadataClient:
        each = [one.connect(process) for one in self.each]
        self._clients.append(PartitionedMetadataClient(each, self.whole, self._setup.clock))
        return self._clients[-1]

    def subscribe(self, process: SimProcess, sink_of: SinkOf) -> Subscription:
        streams = [one.subscribe(process, sink_of) for one in self.each]
        return PartitionedSubscription([one for one in streams if isinstance(one, IndexSubscription)])
