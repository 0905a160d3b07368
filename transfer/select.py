"""Which transport moves which segment's bytes, and the one place where a configuration becomes transports.

A segment's transport is chosen once, and logged once. A transport that the configuration names is used, or the op
fails: no silent fallback.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from kvcore.config.schema import FallbackKind, TransportConfig, TransportKind
from kvcore.errors import ConfigError, PeerUnreachableError, TransferError
from kvcore.telemetry import log_fields
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.types import Segment
from transfer.base import DescribesItself, Direction, SegmentHost, TransferEngine, TransferOp
from transfer.host_process import ProcessSegmentHost
from transfer.limits import TransferLimits
from transfer.memory.segment import SegmentMemory
from transfer.shm import ShmTransfer
from transfer.tcp.host import TcpSegmentHost
from transfer.tcp.transport import TcpTransfer

_LOG = logging.getLogger("transfer")
_WILDCARDS = ("", "0.0.0.0", "::")
_MAX_CHOICES = 1024
"""Kept; the oldest go first."""


class TransferSelector:
    """TransferEngine that hands each segment to the first of `engines` that reaches it. Owns the engines."""

    def __init__(self, kind: str, engines: Sequence[TransferEngine]) -> None:
        self._kind = kind
        self._engines = tuple(engines)
        self._choices: dict[str, tuple[TransferEngine, Segment]] = {}

    def __repr__(self) -> str:
        engines = ", ".join(map(repr, self._engines))
        return f"<TransferSelector {self._kind} choices={len(self._choices)} engines=[{engines}]>"

    @property
    def kind(self) -> str:
        """What was asked for: `auto`, `shm`, `tcp`. See `transport_for` for what moves a segment."""
        return self._kind

    def reaches(self, segment: Segment) -> bool:
        """Whether one of the transports does."""
        return self._choose(segment) is not None

    def transport_for(self, segment: Segment) -> str:
        """As ChoosesTransport.transport_for; what was asked for, if nothing reaches the segment."""
        engine = self._choose(segment)
        return self._kind if engine is None else engine.kind

    def choices(self) -> Mapping[str, str]:
        """Segment id -> transport, for those decided so far; where it can say more (devices, build), also that."""
        return {
            segment_id: engine.describe(segment) if isinstance(engine, DescribesItself) else engine.kind
            for segment_id, (engine, segment) in self._choices.items()
        }

    def register(self, region: memoryview) -> None:
        """With every transport."""
        for engine in self._engines:
            engine.register(region)

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.write."""
        return await self._transfer("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.read."""
        return await self._transfer("read", ops, timeout_s)

    async def aclose(self) -> None:
        """As TransferEngine.aclose."""
        async with asyncio.TaskGroup() as tasks:
            for engine in self._engines:
                tasks.create_task(engine.aclose())

    async def _transfer(
        self, direction: Direction, ops: Sequence[TransferOp], timeout_s: float
    ) -> list[TransferError | None]:
        results: list[TransferError | None] = [None] * len(ops)
        groups: dict[TransferEngine, list[int]] = {}
        for index, op in enumerate(ops):
            engine = self._choose(op.segment)
            if engine is None:
                results[index] = self._unreachable(op.segment)
            else:
                groups.setdefault(engine, []).append(index)

        async def run(engine: TransferEngine, indices: list[int]) -> None:
            part = [ops[index] for index in indices]
            move = engine.write if direction == "write" else engine.read
            for index, error in zip(indices, await move(part, timeout_s), strict=True):
                results[index] = error

        if len(groups) == 1:
            await run(*groups.popitem())
        else:
            async with asyncio.TaskGroup() as tasks:
                for engine, indices in groups.items():
                    tasks.create_task(run(engine, indices))
        return results

    def _choose(self, segment: Segment) -> TransferEngine | None:
        known = self._choices.get(segment.id)
        if known is not None:
            return known[0]
        chosen = next((engine for engine in self._engines if engine.reaches(segment)), None)
        if chosen is not None:
            if len(self._choices) >= _MAX_CHOICES:
                del self._choices[next(iter(self._choices))]
            self._choices[segment.id] = (chosen, segment)
            log_fields(
                _LOG, logging.INFO, "transfer.chosen", segment=segment.id, transport=chosen.kind, asked=self._kind
            )
        return chosen

    def _unreachable(self, segment: Segment) -> TransferError:
        return PeerUnreachableError(
            f"segment {segment.id} cannot be reached by transport {self._kind} "
            f"(it has addresses for {', '.join(sorted(segment.addresses)) or 'none'}, host {segment.host_id})"
        )


def build_transfer(
    config: TransportConfig, host_id: str, limits: TransferLimits = TransferLimits(), *, trust: ClusterTrust = OPEN
) -> TransferSelector:
    """The initiator's side for a configuration. Call it where an event loop runs.

    `host_id` is the node's (`NodeConfig.host_id` or `host_identity()`). Raises ConfigError for an unknown transport,
    and where `ucx` or `nixl` cannot be used as configured, unless a fallback is written. With one, peers that had to
    fall back are reached by it too.
    """
    _check_kinds(config)
    engines: list[TransferEngine] = []
    for kind in _kinds(config):
        try:
            engines.append(_TRANSPORTS[kind].engine(EnginePlan(config, host_id, limits, trust)))
        except ConfigError as error:
            _fall_back(config, kind, error)
    kind = engines[0].kind if len(engines) == 1 else config.kind
    return TransferSelector(kind, engines)


def _kinds(config: TransportConfig) -> list[str]:
    """The transports of a configuration, the preferred one first."""
    named = _AUTO if config.kind == "auto" else (config.kind,)
    if not _TRANSPORTS[named[0]].may_be_missing or config.fallback is None:
        return list(named)
    return [*named, *(_AUTO if config.fallback == "auto" else (config.fallback,))]


def _check_kinds(config: TransportConfig) -> None:
    """For configurations that no file was read for."""
    for field, value, known in (
        ("kind", config.kind, get_args(TransportKind)),
        ("fallback", config.fallback, get_args(FallbackKind)),
    ):
        if value is not None and value not in known:
            raise ConfigError(
                f"transport.{field}: {value!r} is not one of {', '.join(known)}", param=f"transport.{field}"
            )


def _fall_back(config: TransportConfig, kind: str, error: ConfigError) -> None:
    """Go on with the written fallback, and say why; raise `error` if there is none for `kind`."""
    if config.fallback is None or not _TRANSPORTS[kind].may_be_missing:
        raise error
    log_fields(
        _LOG, logging.WARNING, "transfer.fallback", asked=config.kind, used=config.fallback, reason=error.message
    )


class SegmentHosts:
    """What serves one node's segment to its peers. Made by `start_segment_hosts`; close it before the memory."""

    def __init__(self, memory: SegmentMemory, hosts: Mapping[str, SegmentHost]) -> None:
        self._memory = memory
        self._hosts = hosts

    def __repr__(self) -> str:
        return f"<SegmentHosts {self._memory.segment_id} {list(self._hosts.values())!r}>"

    @property
    def addresses(self) -> dict[str, str]:
        """For `Segment.addresses`, as they are now."""
        return {"shm": self._memory.shm_address, **{kind: host.address for kind, host in self._hosts.items()}}

    @property
    def refused(self) -> dict[tuple[str, str], int]:
        """As SegmentHost.refused, by transport."""
        return {(kind, why): count for kind, host in self._hosts.items() for why, count in dict(host.refused).items()}

    async def aclose(self) -> None:
        """As SegmentHost.aclose, for all of them."""
        async with asyncio.TaskGroup() as tasks:
            for host in self._hosts.values():
                tasks.create_task(host.aclose())


async def start_segment_hosts(
    config: TransportConfig,
    memory: SegmentMemory,
    *,
    host: str,
    port: int = 0,
    advertise_host: str | None = None,
    on_change: Callable[[], None] = lambda: None,
    on_reseal: Callable[[], None] = lambda: None,
    limits: TransferLimits = TransferLimits(),
    trust: ClusterTrust = OPEN,
) -> SegmentHosts:
    """The target's side for a configuration: TCP unless shared memory was asked for by name; `shm` costs nothing.

    UCX and NIXL serve from a process of their own, which may have to be started again: `on_change` is called when
    `addresses` are no longer what they were, and `on_reseal` when they are the same, sealed for other secrets.

    `port` is `NodeConfig.transfer_port`, of TCP; UCX and NIXL take ports of their own. Raises ConfigError, also when
    `host` is a wildcard and `advertise_host` is not given where TCP is served: peers would be told an address that
    they cannot connect to.
    """
    _check_kinds(config)
    plan = HostPlan(config, memory, host, port, advertise_host, on_change, on_reseal, limits, trust)
    hosts: dict[str, SegmentHost] = {}
    for kind in _kinds(config):
        try:
            if (made := _TRANSPORTS[kind].host(plan)) is not None:
                await made.start()
                hosts[kind] = made
        except ConfigError as error:
            try:
                _fall_back(config, kind, error)
            except ConfigError:
                await SegmentHosts(memory, hosts).aclose()
                raise
    return SegmentHosts(memory, hosts)


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What a host is made of: as the arguments of `start_segment_hosts`."""

    config: TransportConfig
    memory: SegmentMemory
    host: str
    port: int
    advertise_host: str | None
    on_change: Callable[[], None]
    on_reseal: Callable[[], None]
    limits: TransferLimits
    trust: ClusterTrust


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an initiator's side is made of: as the arguments of `build_transfer`."""

    config: TransportConfig
    host_id: str
    limits: TransferLimits
    trust: ClusterTrust


@dataclass(frozen=True, slots=True)
class Transport:
    """One kind: how its two sides are made, either of which may raise ConfigError.

    `host` returns None where peers need nobody to serve them. `may_be_missing`: it needs a library and devices, so a
    configuration may name a fallback for it.
    """

    engine: Callable[[EnginePlan], TransferEngine]
    host: Callable[[HostPlan], SegmentHost | None] = lambda plan: None
    may_be_missing: bool = False


def _seals(config: TransportConfig, trust: ClusterTrust) -> bool:
    """Raises ConfigError where MACs of frames are wanted and there is no key for them."""
    if config.integrity == "frames" and trust.secrets is None:
        raise ConfigError("transport.integrity: frames needs the cluster's secret", param="transport.integrity")
    return config.integrity == "frames"


def _tcp(plan: EnginePlan) -> TransferEngine:
    sealed = _seals(plan.config, plan.trust)
    return TcpTransfer(plan.config.streams, plan.limits.tcp, plan.trust, sealed=sealed)


def _ucx(plan: EnginePlan) -> TransferEngine:
    from transfer.ucx.transport import UcxTransfer  # needs a library, which only those who ask for it load

    return UcxTransfer(plan.config, plan.limits.ucx, plan.trust)


def _nixl(plan: EnginePlan) -> TransferEngine:
    from transfer.nixl.transport import NixlTransfer  # as above

    return NixlTransfer(plan.config, plan.limits.nixl, plan.trust)


def _tcp_host(plan: HostPlan) -> SegmentHost:
    if (plan.advertise_host or plan.host) in _WILDCARDS:
        raise ConfigError(
            f"nodes.<n>.host: {plan.host!r} cannot be announced to other nodes; give the address they use"
        )
    memory = plan.memory
    return TcpSegmentHost(
        memory.segment_id,
        memory.view,
        plan.host,
        plan.port,
        advertise_host=plan.advertise_host,
        limits=plan.limits.tcp,
        trust=plan.trust,
        sealed=_seals(plan.config, plan.trust),
    )


def _process_host(plan: HostPlan) -> SegmentHost:
    return ProcessSegmentHost(
        plan.config.kind,
        plan.memory,
        plan.config,
        plan.on_change,
        plan.limits,
        trust=plan.trust,
        on_reseal=plan.on_reseal,
    )


_TRANSPORTS: Mapping[str, Transport] = {
    "shm": Transport(lambda plan: ShmTransfer(plan.host_id)),
    "tcp": Transport(_tcp, _tcp_host),
    "ucx": Transport(_ucx, _process_host, may_be_missing=True),
    "nixl": Transport(_nixl, _process_host, may_be_missing=True),
}
_AUTO = ("shm", "tcp")
"""What `auto` stands for, the preferred one first."""
