"""Mooncake's store as a tier that nodes and clusters share. Its bytes lie in memory that Mooncake's clients lend it.

Owns the names and what Mooncake's codes mean. A chunk is one value, `kvf1/FINGERPRINT/KEY`, header and payload as in a
segment. Mooncake evicts by itself, knows no time of a key's own and lists nothing.
"""

import asyncio
import importlib.util
import logging
from collections.abc import Collection, Sequence

from kvcore.clock import Clock
from kvcore.config.tiers import MooncakeTierConfig, TierConfig
from kvcore.errors import ConfigError, TransferError
from kvcore.telemetry import log_fields
from kvstore.tiers.base import ChunkName, Cleared, TierChunk, TierOutcome, TierStats
from kvstore.tiers.mooncake.buffer import MooncakeBuffer, MooncakeRoom
from kvstore.tiers.mooncake.client import MooncakeAwayError, MooncakeClient, MooncakePlace
from kvstore.tiers.mooncake.limits import MooncakeLimits
from kvstore.tiers.mooncake.messages import MooncakeOperation
from kvstore.tiers.opening import TierPlace
from transfer.blocking import BatchDeadline, BlockingPool
from transfer.memory.copying import copy
from transfer.ucx.devices import hca_ports

PACKAGE = "mooncake-transfer-engine-non-cuda"
_log = logging.getLogger(__name__)
_COPY_THREADS = 2
_SAVED = {
    0: TierOutcome.OK,
    -705: TierOutcome.OK,
    -200: TierOutcome.FULL,
    -600: TierOutcome.TOO_LARGE,
}
_LOADED = {
    -600: TierOutcome.TOO_LARGE,
    -702: TierOutcome.MISSING,
    -703: TierOutcome.MISSING,
    -704: TierOutcome.MISSING,
    -801: TierOutcome.DAMAGED,
}
_EXPIRED = -707
"""It took longer to read than Mooncake keeps its bytes where they are (5 s by default): it is there, and what was read
may be anything."""
_WORDS = {
    -200: "no room: no client lends it memory, or all that is lent is full",
    -800: "a client that lent memory does not answer",
    -900: "the master does not answer",
}
_NO_PROBLEM = (-702, -703, -704, -705, -706, -707)
"""Of single keys: missing, being written, being read."""


class MooncakeTier:
    """See `Tier`. `ttl_s` is not obeyed (a cluster file that asks for it is refused), and no mark is kept."""

    name = "mooncake"
    shared = True

    def __init__(self, place: MooncakePlace, buffer_bytes: int, limits: MooncakeLimits = MooncakeLimits()) -> None:
        self.max_chunk_bytes = buffer_bytes
        self._limits = limits
        self._buffer = MooncakeBuffer(buffer_bytes)
        self._client = MooncakeClient(place, self._buffer, limits)
        self._copying = BlockingPool("mooncake-tier", _COPY_THREADS)
        self._problem: str | None = None
        self._told = ""

    def __repr__(self) -> str:
        return f"<MooncakeTier {self._client!r}, {self._buffer!r}>"

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """See `Tier`."""
        codes = await self._ask(MooncakeOperation.FIND, [key_of(name) for name in names], timeout_s)
        return [code == 1 for code in codes] if codes is not None else [False] * len(names)

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """See `Tier`."""
        codes = await self._ask(MooncakeOperation.SIZES, [key_of(name) for name in names], timeout_s)
        if codes is None:
            return [TierOutcome.UNAVAILABLE] * len(names)
        return [code if code >= 0 else _LOADED.get(code, TierOutcome.UNAVAILABLE) for code in codes]

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """See `Tier`. What lies there in another size than asked for is TOO_LARGE, as is more than the buffer."""
        outcomes, fitting = self._sorted_out(chunks)
        deadline = BatchDeadline(timeout_s)
        for _ in range(self._limits.load_tries):
            expired = list[int]()
            for group in self._groups(fitting, chunks):
                expired += await self._load(group, [chunks[at] for at in group], outcomes, deadline)
            if not (fitting := expired):
                break
        return outcomes

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """See `Tier`. Asking what is there first spares those bytes, and tells Mooncake that it is used."""
        outcomes, fitting = self._sorted_out(chunks)
        deadline = BatchDeadline(timeout_s)
        keys = [key_of(chunks[at].name) for at in fitting]
        there = dict(zip(fitting, await self._ask(MooncakeOperation.FIND, keys, timeout_s) or (), strict=False))
        for at in fitting:
            if there.get(at) == 1:
                outcomes[at] = TierOutcome.OK
        for group in self._groups([at for at in fitting if there.get(at) == 0], chunks):
            await self._save(group, [chunks[at] for at in group], outcomes, deadline)
        return outcomes

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """See `Tier`. Under the lease of one who reads it, too: that one's check finds out."""
        await self._ask(MooncakeOperation.REMOVE, [key_of(name) for name in names], timeout_s)

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """See `Tier`. It cannot."""
        return 0

    async def generations(self, *, timeout_s: float) -> None:
        """See `Tier`. It cannot list."""

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """See `Tier`. It keeps no marks."""

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """See `Tier`. As nobody can tell who uses what, only `own` None clears anything."""
        if own is not None:
            return Cleared(incomplete="Mooncake does not tell who uses a generation, so none is cleared as stale")
        patterns = [f"^kvf1/{fingerprint.hex()}/.*" for fingerprint in fingerprints]
        codes = await self._ask(MooncakeOperation.CLEAR, patterns, timeout_s)
        incomplete = self._problem or self._client.problem or "" if codes is None or min(codes, default=0) < 0 else ""
        return Cleared(sum(max(0, code) for code in codes or ()), incomplete)

    def stats(self) -> TierStats:
        """See `Tier`. It cannot know what lies in Mooncake."""
        return TierStats(problem=self._client.problem or self._problem)

    async def aclose(self) -> None:
        """See `Tier`. What this node lent is taken back from Mooncake, with all that lies in it."""
        await self._client.aclose()
        await self._copying.aclose()
        self._buffer.close()

    # --- chunks through the buffer ---

    def _sorted_out(self, chunks: Sequence[TierChunk]) -> tuple[list[TierOutcome], list[int]]:
        """An outcome for each, so far; the positions of those that fit."""
        most = self.max_chunk_bytes
        outcomes = [TierOutcome.TOO_LARGE if chunk.num_bytes > most else TierOutcome.UNAVAILABLE for chunk in chunks]
        return outcomes, [at for at, outcome in enumerate(outcomes) if outcome is TierOutcome.UNAVAILABLE]

    def _groups(self, positions: Sequence[int], chunks: Sequence[TierChunk]) -> list[Sequence[int]]:
        return [positions[run] for run in self._buffer.groups([chunks[at].num_bytes for at in positions])]

    async def _load(
        self, group: Sequence[int], chunks: Sequence[TierChunk], outcomes: list[TierOutcome], deadline: BatchDeadline
    ) -> list[int]:
        """Those of the group that are to be read again."""
        if (room := await self._room(chunks, deadline)) is None:
            return []
        with room:
            keys = [key_of(chunk.name) for chunk in chunks]
            codes = await self._in_time(MooncakeOperation.LOAD, keys, room, deadline)
            arrived, pairs = list[int](), list[tuple[memoryview, memoryview]]()
            for at, chunk, view, code in zip(group, chunks, room.views, codes or (), strict=False):
                if code == chunk.num_bytes:
                    arrived.append(at)
                    pairs += _pairs(chunk, view)
                else:
                    unknown = TierOutcome.TOO_LARGE if code >= 0 else TierOutcome.UNAVAILABLE
                    outcomes[at] = _LOADED.get(code, unknown)
            if await self._copied(pairs, deadline):
                for at in arrived:
                    outcomes[at] = TierOutcome.OK
            return [at for at, code in zip(group, codes or (), strict=False) if code == _EXPIRED]

    async def _save(
        self, group: Sequence[int], chunks: Sequence[TierChunk], outcomes: list[TierOutcome], deadline: BatchDeadline
    ) -> None:
        if (room := await self._room(chunks, deadline)) is None:
            return
        with room:
            pairs = [pair for chunk, view in zip(chunks, room.views, strict=True) for pair in _pairs(chunk, view)]
            if await self._copied([(whole, own) for own, whole in pairs], deadline):
                keys = [key_of(chunk.name) for chunk in chunks]
                codes = await self._in_time(MooncakeOperation.SAVE, keys, room, deadline)
                for at, code in zip(group, codes or (), strict=False):
                    outcomes[at] = _SAVED.get(code, TierOutcome.UNAVAILABLE)

    async def _room(self, chunks: Sequence[TierChunk], deadline: BatchDeadline) -> MooncakeRoom | None:
        if self._client.closed:
            return None
        try:
            async with asyncio.timeout(deadline.remaining()):
                return await self._buffer.room([chunk.num_bytes for chunk in chunks])
        except (TimeoutError, TransferError):
            self._say("calls that are late hold all of its buffer" if self._client.problem is None else None)
            return None

    async def _copied(self, pairs: Sequence[tuple[memoryview, memoryview]], deadline: BatchDeadline) -> bool:
        """Copy each second into its first, in a thread. Whether in time; when this returns the copying has ended."""

        def copy_all() -> None:
            for target, source in pairs:
                copy(target, source)

        try:
            await self._copying.run(copy_all, _nothing, deadline)
        except TransferError:
            return False
        return True

    # --- asking ---

    async def _in_time(
        self, operation: MooncakeOperation, keys: Sequence[str], room: MooncakeRoom, deadline: BatchDeadline
    ) -> list[int] | None:
        try:
            left_s = deadline.remaining()
        except TransferError:
            return None
        return await self._ask(operation, keys, left_s, room)

    async def _ask(
        self, operation: MooncakeOperation, keys: Sequence[str], timeout_s: float, room: MooncakeRoom | None = None
    ) -> list[int] | None:
        """Mooncake's codes, one a key; None: it could not be asked, and `stats` says why."""
        if not keys:
            return []
        if self._client.closed or timeout_s <= 0:
            return None
        try:
            codes = await self._client.call(operation, keys, room, timeout_s)
        except MooncakeAwayError as error:
            self._say(str(error))
            return None
        wrong = [code for code in codes if code < 0 and code not in _NO_PROBLEM]
        self._say(_WORDS.get(wrong[0], f"it answers {wrong[0]}") if wrong else None)
        return codes

    def _say(self, problem: str | None) -> None:
        self._problem = None if problem is None else f"{self._client.place.shown}: {problem}"
        if self._problem is not None and self._problem != self._told:
            self._told = self._problem
            log_fields(_log, logging.WARNING, "mooncake_tier", problem=self._problem)


def key_of(name: ChunkName) -> str:
    """What a chunk is called in Mooncake."""
    return f"kvf1/{name.text}"


def _pairs(chunk: TierChunk, whole: memoryview) -> list[tuple[memoryview, memoryview]]:
    """Each view of the chunk's with its part of `whole`."""
    pairs, start = list[tuple[memoryview, memoryview]](), 0
    for view in chunk.memory:
        pairs.append((view.cast("B"), whole[start : start + view.nbytes]))
        start += view.nbytes
    return pairs


def _nothing() -> None:
    """A copy takes milliseconds: it is waited for."""


def place_of(config: MooncakeTierConfig, own_host: str) -> MooncakePlace:
    """Raises ConfigError for what cannot be on this machine."""
    host, _, port = config.master.rpartition(":")
    if config.protocol == "rdma":
        _check_rdma(config)
    if importlib.util.find_spec("mooncake") is None:
        raise ConfigError(f"tiers.mooncake: Mooncake's client is not installed; pip install {PACKAGE}")
    lent, local = int(config.global_segment_size or 0), int(config.local_buffer_size or 0)
    options = {
        "metadata_server": config.metadata_server,
        "global_segment_size": str(lent),
        "local_buffer_size": str(local),
        "protocol": config.protocol,
        "rdma_devices": ",".join(config.rdma_devices),
        "master_server_addr": config.master,
    }
    return MooncakePlace(host.strip("[]"), int(port), options, config.local_hostname or own_host, lent + local)


def _check_rdma(config: MooncakeTierConfig) -> None:
    """Raises ConfigError that names each device that is not here or not active."""
    ports = hca_ports()
    active = {name.partition(":")[0] for name, state in ports.items() if state == "ACTIVE"}
    missing = [device for device in config.rdma_devices if device not in active]
    here = f"active RDMA devices of this machine: {', '.join(sorted(active)) or 'none'}"
    if missing:
        raise ConfigError(f"tiers.mooncake.rdma_devices: {', '.join(missing)} cannot be used; {here}")
    if not active:
        raise ConfigError(f"tiers.mooncake.protocol: rdma needs an RDMA device; {here}")


async def open_tier(config: TierConfig, place: TierPlace, clock: Clock) -> MooncakeTier:
    """See `kvstore.tiers.opening`. Its client is set up beside, and lends what it is to lend from then on."""
    assert isinstance(config, MooncakeTierConfig)
    return MooncakeTier(place_of(config, place.host), int(config.in_flight))
