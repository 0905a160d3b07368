"""What a metadata server begins with: an empty index that no other life can be taken for, pins, orders.

Where several share their records, it begins so each time that it leads.
"""

import asyncio
import secrets
from dataclasses import replace

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import internal_url, own_part
from kvcore.eviction.quotas import TenantShares
from kvcore.identity import ClusterIdentity
from metadata_server.core import Kept, MetadataCore
from metadata_server.index.state import MetadataState
from metadata_server.leading.lives import by_clock, first_generation
from metadata_server.records.base import Guard, Records
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.node_orders import NodeOrdering
from metadata_server.records.pins import PinRecords
from metadata_server.records.switches import BlendSwitches
from metadata_server.versions import SPOKEN


def new_index(config: ClusterConfig, clock: Clock, first: int, shares: TenantShares | None = None) -> MetadataState:
    """Empty, with an epoch of its own. `first`: its first generation. `shares`: as of MetadataState."""
    server = config.metadata_server
    return MetadataState(
        config.store,
        server.node_ttl_s,
        epoch=f"{int(clock.wall() * 1000):x}-{secrets.token_hex(4)}",
        speaks=replace(SPOKEN, part=own_part(server)),
        first_generation=first,
        identity=_identity(config),
        event_log=server.event_log,
        shares=shares,
    )


def _identity(config: ClusterConfig) -> ClusterIdentity:
    """With `security.nodes` a node that the file describes is where the file says: who has the cluster's secret, but
    listens elsewhere, gets no request in its name."""
    listed = config.security.nodes
    if listed is None:
        return ClusterIdentity(config.cluster, config.model.name)
    urls = {name: internal_url(config, node.host, node.port) for name, node in config.nodes.items() if node.url is None}
    return ClusterIdentity(config.cluster, config.model.name, frozenset(listed), urls)


class Terms:
    """Begins and ends the terms of one server. `run` it beside the election."""

    def __init__(
        self,
        config: ClusterConfig,
        clock: Clock,
        records: Records,
        core: MetadataCore,
        limits: RecordsLimits = RecordsLimits(),
        *,
        shares: TenantShares | None = None,
    ) -> None:
        self._shares = shares
        self._config = config
        self._clock = clock
        self._records = records
        self._core = core
        self._limits = limits
        self._kept: Kept | None = None
        """What writes down the term that we lead."""

    async def lead(self, guard: Guard) -> None:
        """Make the core ready for the term. Raises RecordsUnavailableError, NotLeaderError if it is over already."""
        first = await first_generation(self._records, self._clock, guard)
        state = new_index(self._config, self._clock, first, self._shares)
        pins = PinRecords(self._records, self._clock, guard=guard)
        await pins.restore(state)
        orders = NodeOrdering(state, self._clock, self._records, guard=guard)
        await orders.restore()
        self._kept = pins, orders, BlendSwitches(self._records, guard=guard)
        self._core.begin(state, self._kept, guard.revision)

    def end(self) -> None:
        """The term is over: nothing of it is kept."""
        self._kept = None
        state = new_index(self._config, self._clock, by_clock(self._clock), self._shares)
        self._core.begin(state)

    async def run(self) -> None:
        """Write down what ends by itself, until cancelled."""
        while True:
            await asyncio.sleep(self._limits.sweep_s)
            for kept in self._kept[:2] if self._kept is not None else ():
                await kept.sweep()
