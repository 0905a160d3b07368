"""Moves of chunks between segments of the simulated cluster: drains with `--move` and rebalancing, under faults.

The nodes' movers are production code; orders come from an operator who speaks to the metadata server alone.
"""

import random
from dataclasses import replace

import msgspec
from support.sim_plan import Fault, Plan, make_plan

from kvcore.types import ChunkKey
from kvnode.limits import NodeLimits
from kvstore.manifest import scan
from metadata_server.cache_messages import NodeOrderRequest, RebalanceRequest
from metadata_server.core import MetadataCore

ROOM = 4096
"""What one chunk takes in a segment."""
MOVES = NodeLimits(move_poll_s=0.1, move_bytes=3 * ROOM, move_share=0.8)
STORES = ("s1", "s2")


def moving_plan(seed: int, *, wild: bool) -> Plan:
    """The plan of a seed with two stores more, to which prefillers and decoders are emptied and evened out while
    requests come. `wild`: with the seed's own faults, too; else only what dies in the middle of a move."""
    plan, dice = make_plan(seed), random.Random(f"moves {seed}")
    faults = [*plan.faults] if wild else []
    first = min(wanted.at_s for wanted in plan.requests)
    for _ in range(4):
        at_s = first + dice.uniform(0.1, 3.5)
        name = dice.choice(plan.nodes)
        if dice.random() < 0.5:
            faults += [Fault(at_s, "drain", (name,)), Fault(at_s + dice.uniform(0.3, 2.0), "undrain", (name,))]
        else:
            faults += [Fault(at_s, "rebalance", ("start",))]
            if dice.random() < 0.3:
                faults += [Fault(at_s + dice.uniform(0.05, 0.5), "rebalance", ("stop",))]
        middle_s = at_s + dice.uniform(0.05, 0.6)
        match dice.choice(["source", "target", "metadata", "engine", "nothing"]):
            case "source":
                faults += [Fault(middle_s, "kill_node", (name,)), Fault(middle_s + 0.3, "start_node", (name,))]
            case "target":
                where = (dice.choice(STORES),)
                faults += [Fault(middle_s, "kill_node", where), Fault(middle_s + 0.3, "start_node", where)]
            case "metadata":
                faults += [Fault(middle_s, "kill_metadata"), Fault(middle_s + 0.2, "start_metadata")]
            case "engine":
                faults += [Fault(middle_s, "kill_engine", (name,)), Fault(middle_s + 0.2, "start_engine", (name,))]
    return replace(
        plan,
        store=msgspec.structs.replace(plan.store, reserve_ttl_s=5.0),  # as outside, longer than a batch takes
        segment_bytes=ROOM * dice.choice([8, 12, 20]),
        sizes={name: ROOM * dice.choice([6, 24, 60]) for name in STORES},
        nodes=(*plan.nodes, *STORES),
        faults=sorted(faults, key=lambda fault: fault.at_s),
    )


def order(core: MetadataCore, now: float, kind: str, *where: str) -> None:
    """An operator's order."""
    match kind:
        case "rebalance":
            core.state.moves.order(RebalanceRequest(action=where[0]), now)  # type: ignore[arg-type]
        case _:
            request = NodeOrderRequest(node_id=where[0], action=kind, move=kind == "drain")  # type: ignore[arg-type]
            core.state.orders.give(request, None, 0.0)


def not_in_manifests(stored: dict[str, set[ChunkKey]], memory: dict[str, memoryview]) -> list[str]:
    """What the index has and no header in its segment says. The other way round it is as it should be: what was evicted
    or given up stays in memory until others are written there."""
    problems = []
    for segment_id, keys in stored.items():
        there = {entry.key for entry in scan(memory[segment_id])} if segment_id in memory else set()
        problems += [f"{key.hex()} is listed in {segment_id} and does not lie there" for key in keys - there]
    return problems
