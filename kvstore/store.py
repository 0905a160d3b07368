"""The distributed store: match, wait, get and put of chunks, with every chunk verified on read.

Owns no memory and no index: places come from the metadata server, bytes move by the transports. The cache never
decides correctness: whatever is missing, late, damaged or unreachable is a value that says "compute it".
"""

import asyncio
from collections.abc import Mapping, Sequence

from kvcore.clock import Clock
from kvcore.config.schema import StoreConfig
from kvcore.types import ChunkKey, KVSpec, OwnerTag
from kvstore.background import Background
from kvstore.chunk_format import HEADER_BYTES
from kvstore.counters import Count, StoreCounters
from kvstore.integrity.checks import Integrity
from kvstore.integrity.scratch import Scratch
from kvstore.limits import StoreLimits
from kvstore.placement import Placement, Reserved
from kvstore.put_session import PutContext, PutSession
from kvstore.reader import ChunkReader
from kvstore.routes import Routes
from kvstore.types import GetResult, Match, MovedBytes, RunBlocking
from kvstore.writer import ChunkWriter
from metadata_server.client import MetadataClient
from transfer.base import TransferEngine


class KVStore:
    """The store as one process uses it. Close it with `aclose`; metadata client and transfer stay the caller's.

    `node_id` and `incarnation` name the node that the process belongs to: its reservations die with it, and its own
    segment is read first, then those on the same `host_id` (None: not known). `spec.chunk_bytes` is the payload of
    every full chunk. `run_blocking` runs checksums over large payloads and `register` (default: in a thread); a
    simulation passes `run_inline`.
    """

    def __init__(
        self,
        *,
        spec: KVSpec,
        node_id: str,
        incarnation: int,
        metadata: MetadataClient,
        transfer: TransferEngine,
        clock: Clock,
        host_id: str | None = None,
        config: StoreConfig | None = None,
        integrity: Integrity | None = None,
        run_blocking: RunBlocking | None = None,
        limits: StoreLimits = StoreLimits(),
    ) -> None:
        """Default `config`: StoreConfig(). `integrity`: how chunks are sealed and checked; by checksum if not given."""
        config, integrity = config or StoreConfig(), integrity or Integrity()
        self._counters = StoreCounters()
        self._background = Background(limits.max_background_tasks)
        self._reports: set[asyncio.Task[None]] = set()
        self._spec = spec
        self.node_id = node_id
        self._limits = limits
        self._placement = Placement(
            metadata,
            node_id=node_id,
            incarnation=incarnation,
            clock=clock,
            config=config,
            counters=self._counters,
            background=self._background,
            limits=limits,
        )
        routes = Routes(transfer, node_id, host_id, clock=clock, limits=limits, counters=self._counters)
        self._transfer = transfer
        self._run_blocking = run = run_blocking or asyncio.to_thread
        slot_bytes = max(spec.chunk_bytes, limits.scratch_slot_bytes)
        num_slots = max(2, limits.scratch_bytes // slot_bytes)
        self._scratch = Scratch(slot_bytes, num_slots) if integrity.encrypt else None
        self._scratch_registered = False
        self._reader = ChunkReader(
            fingerprint=spec.fingerprint,
            transfer=transfer,
            routes=routes,
            clock=clock,
            counters=self._counters,
            integrity=integrity,
            run_blocking=run,
            limits=limits,
        )
        self._put_context = PutContext(
            placement=self._placement,
            writer=ChunkWriter(
                fingerprint=spec.fingerprint,
                transfer=transfer,
                routes=routes,
                clock=clock,
                counters=self._counters,
                integrity=integrity,
                run_blocking=run,
                limits=limits,
                scratch=self._scratch,
            ),
            background=self._background,
            clock=clock,
            counters=self._counters,
            close_s=limits.close_s,
        )

    def __repr__(self) -> str:
        return f"<KVStore of node {self.node_id} for {self._spec.model_id}: {self._placement}>"

    async def register(self, region: memoryview) -> None:
        """Make local memory that chunks are read into and written from known to the transports: once, before its first
        use, and it lives until they are closed. Off the loop: RDMA pins it. Raises ConfigError if it cannot be."""
        await self._run_blocking(lambda: self._transfer.register(region))
        if self._scratch is not None and not self._scratch_registered:
            self._scratch_registered, scratch = True, self._scratch.memory
            await self._run_blocking(lambda: self._transfer.register(scratch))

    async def match(
        self, keys: Sequence[ChunkKey], *, timeout_s: float, leased: bool = True, owner: OwnerTag | None = None
    ) -> Match:
        """Longest prefix of `keys` that is complete. Metadata server away: an empty Match, counted, never an error.

        The Match holds a read lease until `release(match)` or its expiry (`config.read_lease_s`), which reads under way
        put off. A call that is cancelled, or whose reply does not come, leaves no lease behind. `leased` False: nothing
        is to be read, so there is none. `owner`: whose prompt it is, for the bounds of one tenant.
        """
        if not keys:
            return Match()
        return await self._placement.match(keys, timeout_s, leased=leased, owner=owner)

    async def wait(
        self,
        keys: Sequence[ChunkKey],
        *,
        more_than: int,
        timeout_s: float,
        leased: bool = True,
        owner: OwnerTag | None = None,
    ) -> Match:
        """As `match`, answered once more than `more_than` leading keys are complete or time, a minute at most, is up
        (then: whatever is complete, perhaps not more). Metadata server away: an empty Match at once; the caller paces
        its retries.

        Cancellation ends the wait at once; a lease granted in that very moment is given back in the background.
        """
        if not keys:
            return Match()
        return await self._placement.wait(keys, more_than, timeout_s, leased=leased, owner=owner)

    async def get_into(
        self,
        match: Match,
        start: int,
        buffers: Sequence[Sequence[memoryview]],
        *,
        timeout_s: float,
        owner: OwnerTag | None = None,
    ) -> GetResult:
        """Read chunks `start .. start + len(buffers)` of the match, each scattered over the views `buffers[i]` (payload
        only, together exactly the chunk's size, writable, C-contiguous; not to be read before the call has returned).

        Every chunk is verified on the caller's copy; one that fails is read from its next replica while time is left,
        and what was wrong is reported to the metadata server in the background. Never raises for a chunk's sake.
        `owner`: whose chunks they have to be, if that is known.
        """
        if not 0 <= start <= start + len(buffers) <= match.num_chunks:
            raise ValueError(f"chunks {start}..{start + len(buffers)} are not in a match of {match.num_chunks}")
        with self._placement.renewing(match):
            report = await self._reader.read(match, start, buffers, timeout_s, owner=owner)
        if report.refused:
            if self._background.full:
                self._counters.add(Count.REPORTS_DROPPED, len(report.refused))
            else:
                reporting = self._background.spawn(self._placement.quarantine(report.refused))
                self._reports.add(reporting)
                reporting.add_done_callback(self._reports.discard)
        return report.result

    async def release(self, match: Match) -> None:
        """Give the match's lease back; bounded, never raises, safe to call twice. The work survives cancellation."""
        if match.lease is not None:
            await asyncio.shield(self._background.spawn(self._placement.release(match)))

    def release_soon(self, match: Match) -> None:
        """As `release`, in the background: a call to the metadata server that nothing has to wait for."""
        self._placement.release_soon(match)

    async def begin_put(
        self,
        keys: Sequence[ChunkKey],
        *,
        prefer_segment: str | None,
        timeout_s: float,
        sizes: Mapping[ChunkKey, int] | None = None,
        owner: OwnerTag | None = None,
        public: frozenset[ChunkKey] = frozenset(),
    ) -> PutSession:
        """Reserve room for all `keys` in one batch. Metadata away or store full: a session that accepts nothing.

        `sizes`: payload bytes of those that are shorter than `spec.chunk_bytes`, as a prompt's tail is; others of its
        entries are ignored. Raises ValueError for a size that no chunk has. `owner`: whose quota they count for.
        `public`: those that are written as nobody's, for all to read.

        Reports of refused chunks that are under way go first (bounded as any call): their keys must not count as there.
        The caller must `aclose` the session. A cancelled call leaves no reservation behind.
        """
        distinct = list(dict.fromkeys(keys))
        if not distinct:
            return PutSession(self._put_context, Reserved())
        if self._reports:  # else what was just refused still counts as there, and is not written again
            await asyncio.wait(self._reports, timeout=timeout_s)
        lengths = {key: HEADER_BYTES + self._payload_bytes(key, sizes or {}) for key in distinct}
        reserved = await self._placement.reserve(lengths, prefer_segment, timeout_s, owner=owner)
        return PutSession(self._put_context, reserved, public)

    def counters(self) -> dict[str, int]:
        """A copy of the totals since start; names in `kvstore.counters`."""
        return self._counters.counts()

    def moved(self) -> list[MovedBytes]:
        """Totals since start, one entry a (transport, direction)."""
        return self._counters.moved()

    async def aclose(self) -> None:
        """End background reports and give-backs, bounded. Idempotent. Sessions must be closed before."""
        await self._background.aclose(self._limits.close_s)

    def _payload_bytes(self, key: ChunkKey, sizes: Mapping[ChunkKey, int]) -> int:
        size, full = sizes.get(key, self._spec.chunk_bytes), self._spec.chunk_bytes
        if not 0 < size <= full:
            raise ValueError(f"a chunk's payload has 1 to {full} bytes, not {size}")
        return size
