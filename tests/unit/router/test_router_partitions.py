"""The router's index of several partitions: as one, and what becomes of one touches no other."""

import random

import msgspec
from support.router_fakes import cluster_config, two_and_two

from kvcore.clock import ManualClock
from kvcore.config.partitions import PartitionConfig
from kvcore.config.schema import MetadataServerConfig
from kvcore.partitions import Part, Partitions
from kvcore.types import ChunkKey, NodeInfo, Role
from metadata_server.messages import Event, EventKind
from router.nodes.cluster import Cluster
from router.nodes.limits import NodeHealthLimits
from router.nodes.prober import Prober
from router.nodes.problems import ClusterProblems
from router.routing.index import PrefixHits, PrefixIndex
from router.routing.parted_index import PartedIndex

ABC = Partitions(("a", "b", "c"))
KEYS = [ChunkKey(bytes([i * 7]) * 16) for i in range(24)]


def test_it_finds_what_one_index_finds() -> None:
    dice, one, several = random.Random(1), PrefixIndex(), PartedIndex(ABC)
    found = 0
    for _ in range(4000):
        slot, keys = (dice.choice("mno"), dice.choice("xy")), dice.sample(KEYS, 4)
        match dice.randrange(20):
            case 0:
                one.drop_node(slot[0])
                several.drop_node(slot[0])
            case n if n < 6:
                one.remove(slot[0], keys, slot[1])
                for key in keys:
                    several.parts[ABC.number_of(key)].remove(slot[0], [key], slot[1])
            case _:
                one.store(slot[0], keys, slot[1])
                for key in keys:
                    several.parts[ABC.number_of(key)].store(slot[0], [key], slot[1])
        one.sweep()
        several.sweep()
        asked = dice.sample(KEYS, 10)
        hits = several.find(asked)
        assert hits == one.find(asked)
        assert bool(one) == bool(several)
        assert set(several.held_by("m", asked)) == set(one.held_by("m", asked))
        found += hits.longest > 2 and len(hits.by_node) > 1
    assert found > 500


def parted_cluster() -> tuple[Cluster, Prober]:
    nodes = two_and_two()
    partitions = [PartitionConfig(name=name, port=port) for port, name in enumerate(ABC.names, start=1)]
    config = msgspec.structs.replace(
        cluster_config(nodes.nodes), metadata_server=MetadataServerConfig(partitions=partitions)
    )
    cluster = Cluster(config, ManualClock())
    return cluster, Prober(config.router, cluster, nodes, ManualClock())


def tell(cluster: Cluster, number: int, *events: Event) -> None:
    cluster.sink_of(Part(ABC, number)).on_events(list(events))


def stored(keys: list[ChunkKey]) -> Event:
    return Event(seq=1, kind=EventKind.STORED, node_id="d0", segment_id="d0.1", keys=keys)


UP = Event(
    seq=1,
    kind=EventKind.NODE_UP,
    node_id="d0",
    node=NodeInfo(id="d0", role=Role.DECODER, control_url="http://127.0.0.1:3", incarnation=1),
)
DOWN = Event(seq=2, kind=EventKind.NODE_DOWN, node_id="d0")


def test_a_reset_or_a_death_in_one_partition_leaves_the_keys_of_the_others() -> None:
    cluster, _ = parted_cluster()
    own = {number: [key for key in KEYS if ABC.number_of(key) == number] for number in range(3)}
    for number in range(3):
        tell(cluster, number, UP, stored(own[number]))
    assert cluster.index.find(KEYS) == PrefixHits(len(KEYS), {"d0": len(KEYS)})
    cluster.sink_of(Part(ABC, 1)).on_reset()
    assert [cluster.index.find([key]).longest for key in KEYS] == [ABC.number_of(key) != 1 for key in KEYS]
    tell(cluster, 2, DOWN)
    assert [cluster.index.find([key]).longest for key in KEYS] == [ABC.number_of(key) == 0 for key in KEYS]
    tell(cluster, 1, UP, stored(own[1]))
    assert [cluster.index.find([key]).longest for key in KEYS] == [ABC.number_of(key) != 2 for key in KEYS]


def test_a_node_is_there_as_long_as_a_partition_knows_it() -> None:
    cluster, _ = parted_cluster()
    for number in range(3):
        tell(cluster, number, UP)
    node = cluster.nodes["d0"]
    tell(cluster, 0, DOWN)
    cluster.sink_of(Part(ABC, 1)).on_reset()
    assert node.lease is not None and not node.lapsed
    tell(cluster, 2, DOWN)
    assert node.lease is None and node.lapsed
    cluster.sink_of(Part(ABC, 0)).on_reset()
    assert not node.lapsed, "nothing is known of that server"


async def test_a_node_that_one_partition_does_not_know_is_told_of() -> None:
    cluster, prober = parted_cluster()
    await prober.probe()
    problems = ClusterProblems(cluster, ManualClock(), lambda: True, NodeHealthLimits(unknown_s=0.0))
    for number in range(3):
        for node in cluster.nodes.values():
            assert node.report is not None
            event = Event(seq=1, kind=EventKind.NODE_UP, node_id=node.id, node=node.report.node)
            if (number, node.id) != (1, "d0"):
                tell(cluster, number, event)
    (line,) = problems.lines()
    assert "decoder d0 at" in line and "partition b does not know it: of what it computes nothing that belongs" in line
