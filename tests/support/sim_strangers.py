"""Faults of identity: a foreign node joins, a second process has a node's id, a clock steps back across a restart.

Owns the processes that do not belong, and says what must hold of them.
"""

import random

from msgspec.structs import replace
from support.sim_nodes import CLUSTER, MODEL, SimMetadata, SimNode, SimSetup
from support.sim_plan import Fault, Wanted
from support.sim_ways import METADATA, SimNodeClient

from kvcore.types import Role

_CLOCKED = ("p1", "d1")
"""Nodes of an earlier version: their incarnations are from their clocks, and they do not say what they are."""
_DRAWN = ("p2", "d2")
_BACK_S = 1.0


def identity_faults(seed: int, requests: list[Wanted], *, peaceful: bool) -> list[Fault]:
    """Of each kind one or two, while requests are under way; `peaceful`: the metadata server stays up."""
    dice = random.Random(f"identity {seed}")
    faults: list[Fault] = []
    for _ in range(dice.choice([1, 2])):
        at_s = dice.choice(requests).at_s - 0.3 * dice.random()
        name, differs = dice.choice(["x1", "x1", *_CLOCKED, *_DRAWN]), dice.choice(["cluster", "model"])
        faults += [Fault(at_s, "foreign", (name, differs)), Fault(at_s + 3 * dice.random(), "foreign_ends", (name,))]
    twin = (dice.choice(_DRAWN),)
    at_s = dice.choice(requests).at_s
    faults += [Fault(at_s, "twin", twin), Fault(at_s + dice.choice([0.5, 3.0, 30.0]), "twin_ends", twin)]
    if dice.random() < 0.5:  # the first one dies, and comes back while the second has its place or will have it
        faults += [
            Fault(at_s + 0.2, "kill_node", twin),
            Fault(at_s + 0.2 + dice.choice([0.1, 1.0, 4.0]), "start_node", twin),
        ]
    for _ in range(dice.choice([1, 2])):
        name, back_s = dice.choice(_CLOCKED), dice.choice(["-0.5", "-3600", "-86400", "+3600"])
        at_s = dice.choice(requests).at_s
        faults += [
            Fault(at_s, "kill_node", (name,)),
            Fault(at_s, "step_clock", (name, back_s)),
            Fault(at_s + dice.choice([0.05, 0.5, 3.0]), "start_node", (name,)),
        ]
    if not peaceful:
        at_s = dice.choice(requests).at_s
        faults += [
            Fault(at_s, "kill_metadata"),
            Fault(at_s, "step_clock", (METADATA, "-3600")),
            Fault(at_s + dice.choice([0.05, 1.0]), "start_metadata"),
        ]
    return faults


class Strangers:
    """Those of one run. `nodes` are the cluster's own."""

    def __init__(
        self, setup: SimSetup, metadata: SimMetadata, client: SimNodeClient, nodes: dict[str, SimNode], peaceful: bool
    ) -> None:
        self._setup = setup
        self._metadata = metadata
        self._client = client
        self._nodes = nodes
        self._peaceful = peaceful
        self._foreign: dict[str, SimNode] = {}
        self._twins: dict[str, SimNode] = {}
        self._ended: list[SimNode] = []
        self._away_since: dict[str, float] = {}
        self.problems: set[str] = set()
        for name in _CLOCKED:
            nodes[name].clocked = True

    def join_foreign(self, node_id: str, differs: str) -> None:
        """A node with other weights, whose file has our metadata server's address but another name of `differs`."""
        if node_id not in self._foreign:
            mine = {"cluster": CLUSTER, "model": MODEL, differs: "other"}
            engine = replace(self._setup.engine, weights_version="other")
            self._foreign[node_id] = self._start(node_id, f"foreign-{node_id}", Role.DECODER, engine=engine, **mine)

    def join_twin(self, node_id: str) -> None:
        """A second process with the id of one of our nodes, elsewhere."""
        role = Role.PREFILLER if node_id[0] == "p" else Role.DECODER
        self._twins[node_id] = self._start(node_id, f"twin-{node_id}", role, cluster=CLUSTER, model=MODEL)

    def end_foreign(self, node_id: str) -> None:
        """It is gone."""
        self._end(self._foreign, node_id)

    def end_twin(self, node_id: str) -> None:
        """It is gone."""
        self._end(self._twins, node_id)

    def end(self) -> None:
        """All of them are gone."""
        for those in (self._foreign, self._twins):
            for node_id in list(those):
                self._end(those, node_id)

    async def stop(self) -> None:
        """And torn down."""
        self.end()
        for node in self._ended:
            await node.stop()

    def check(self) -> None:
        """Foreign nodes are no nodes of the cluster and are asked nothing. In peace, where no lease ends before its
        node, no twin has the place of one that has joined, and what is started again at its address is back at once."""
        now = self._setup.clock.now()
        for info in self._metadata.core.state.nodes(now).nodes if self._metadata.alive else ():
            if info.control_url.startswith("http://foreign"):
                self.problems.add(f"the foreign {info.id} was taken in")
            if self._peaceful and info.control_url.startswith("http://twin"):
                own = self._nodes[info.id]
                if own.service.alive and own.membership.registrations:
                    self.problems.add(f"{info.id} has lost its place to a second process of its name")
        for node in (*self._foreign.values(), *self._ended):
            if node.legs and node.host.startswith("foreign"):
                self.problems.add(f"{node.host} was asked to answer requests")
        for name in _CLOCKED if self._peaceful else ():
            node = self._nodes[name]
            if not node.service.alive or node.membership.joined:
                self._away_since.pop(name, None)
            elif now - self._away_since.setdefault(name, now) > _BACK_S:
                self.problems.add(f"{name} was started again and is not known after {_BACK_S} s")

    def _start(self, node_id: str, host: str, role: Role, **how: object) -> SimNode:
        node = SimNode(self._setup, self._metadata, node_id, role, host=host, **how)  # type: ignore[arg-type]
        self._client.nodes[host] = node
        node.start()
        return node

    def _end(self, those: dict[str, SimNode], node_id: str) -> None:
        node = those.pop(node_id, None)
        if node is not None:
            node.kill()
            self._ended.append(node)
