"""Mooncake's dialect over records in memory, with ports that a test opens, closes and cuts off."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from support.metadata_rigs import end

from kvcore.clock import ManualClock
from kvcore.config.mooncake_metadata import LivenessKind, MooncakeMetadataConfig
from metadata_server.mooncake.dialect import MooncakeDialect
from metadata_server.mooncake.expiry import TtlLiveness
from metadata_server.mooncake.keys import Address
from metadata_server.mooncake.limits import DialectLimits
from metadata_server.mooncake.owners import ProbeOutcome
from metadata_server.mooncake.probing import ProbeLiveness
from metadata_server.mooncake.store import DialectStore
from metadata_server.records.base import Records
from metadata_server.records.embedded import EmbeddedRecords, Journal
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.table import RecordsTable

HOST = "10.99.0.1"
NAME = f"{HOST}:17777"
RPC = f"mooncake/rpc_meta/{NAME}"
RAM = f"mooncake/ram/{NAME}"
DEFAULTS = MooncakeMetadataConfig()
AT_ONCE = DialectLimits(settle_s=0.0)
"""A port that refuses is given no time to open."""


def rpc(port: int = 16426, host: str = HOST) -> bytes:
    """A registration as captured."""
    return b'{"ip_or_host_name":"%s","rpc_port":%d}' % (host.encode(), port)


def ram(port: int = 16267, host: str = HOST, length: int = 268435456) -> bytes:
    """Memory lent over tcp, as captured."""
    buffers = b'[{"addr":140479429599296,"length":%d,"name":"%s"}]' % (length, NAME.encode())
    return (
        b'{"buffers":%s,"name":"%s","protocol":"tcp","rdma_server_name":"","tcp_data_host":"%s","tcp_data_port":%d,'
        b'"tcp_proto_version":2,"timestamp":"2026-11-26 08:53:17.048858"}'
    ) % (buffers, NAME.encode(), host.encode(), port)


class Ports:
    """What each port says to a probe; one that nobody opened refuses."""

    def __init__(self, clock: ManualClock) -> None:
        self.say: dict[Address, ProbeOutcome] = {}
        self.asked: list[Address] = []
        self.takes_s = 0.0
        """How long a probe takes."""
        self._clock = clock

    def open(self, port: int, host: str = HOST) -> None:
        self.say[Address(host, port)] = ProbeOutcome.ANSWERED

    def close(self, port: int, host: str = HOST) -> None:
        self.say.pop(Address(host, port), None)

    async def probe(self, address: Address, timeout_s: float) -> ProbeOutcome:
        self.asked.append(address)
        self._clock.advance(self.takes_s)
        return self.say.get(address, ProbeOutcome.REFUSED)


@dataclass
class DialectRig:
    """`look` is a turn of what runs all the time."""

    records: Records
    clock: ManualClock
    ports: Ports
    config: MooncakeMetadataConfig
    limits: DialectLimits
    dialect: MooncakeDialect
    liveness: ProbeLiveness | TtlLiveness

    async def look(self, after_s: float) -> None:
        self.clock.advance(after_s)
        await self.liveness.look()

    async def keys(self) -> set[str]:
        """Of Mooncake's, all that there are."""
        return {record.key.removeprefix("metadata/") for record in (await self.records.listing("metadata/")).records}


async def make_rig(
    records: Records, clock: ManualClock, ports: Ports, config: MooncakeMetadataConfig, limits: DialectLimits
) -> DialectRig:
    """The first life over these records, or a later one."""
    store = DialectStore(records)
    liveness: ProbeLiveness | TtlLiveness
    if config.liveness is LivenessKind.TTL:
        liveness = TtlLiveness(store, clock, config.ttl_s, limits)
    else:
        liveness = ProbeLiveness(store, clock, config, ports.probe, limits)
    dialect = MooncakeDialect(store, liveness, config, limits)
    await dialect.restore()
    return DialectRig(records, clock, ports, config, limits, dialect, liveness)


@asynccontextmanager
async def dialect_rig(
    config: MooncakeMetadataConfig = DEFAULTS,
    limits: DialectLimits = AT_ONCE,
    journal: Journal | None = None,
) -> AsyncIterator[DialectRig]:
    """Over records in memory."""
    clock = ManualClock()
    async with AsyncExitStack() as stack:
        bounds = RecordsLimits()
        records = EmbeddedRecords(RecordsTable((), {}, 0, bounds), clock, journal, bounds)
        stack.push_async_callback(end, asyncio.ensure_future(records.run()))
        stack.push_async_callback(records.aclose)
        yield await make_rig(records, clock, Ports(clock), config, limits)
