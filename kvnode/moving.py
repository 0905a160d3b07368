"""Copies this node's chunks to other nodes: while it is drained for good, so that stopping it loses nothing, and while
its segment is fuller than others.

Owns the pace. Which chunks, and where to, is the metadata server's to say. Invariants: a copy becomes visible only when
the chunk was whole in this segment after its last byte had been read; nothing is written while `work` is paused, nor
after the time for it; nothing stays reserved; what may have been copied is told until it is given up here or its copy
is gone, by whatever metadata server, so that no chunk lies twice for good.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from kvcore.clock import Clock
from kvcore.config.schema import StoreConfig
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.telemetry import log_fields
from kvcore.types import ChunkKey, NodeInfo, Segment
from kvnode.limits import NodeLimits
from kvnode.tasks import PausableWork
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, Expected, pack, parse, verify
from kvstore.placement import Placement, Reserved
from kvstore.types import GetOutcome, RunBlocking
from metadata_server.cache_messages import NODE_ORDERS, ChunkMove, MoveChunksReply, MoveChunksRequest
from metadata_server.client import MetadataClient
from transfer.base import TransferEngine, TransferOp

_logger = logging.getLogger("kvnode")


@dataclass(frozen=True, slots=True)
class _Copy:
    """One chunk on its way. `header` is the one that its copy is to have."""

    move: ChunkMove
    segment: Segment
    source: memoryview
    header: ChunkHeader

    def op(self, checksum: int, *, payload: bool) -> TransferOp:
        """Its header with this checksum, alone or with what follows."""
        header = memoryview(pack(replace(self.header, checksum=checksum)))
        buffers = [header, self.source[HEADER_BYTES:]] if payload else [header]
        return TransferOp(self.segment, self.move.target.offset, buffers)

    def is_whole(self) -> bool:
        """Whether the chunk lies in this segment as it did when it was read first. Reads every byte."""
        ref, header = self.move.source, self.header
        expected = Expected(ref.key, header.fingerprint, ref.generation, header.payload_length)
        return verify(self.source[:HEADER_BYTES], expected, [self.source[HEADER_BYTES:]]) is GetOutcome.OK


class ChunkMover:
    """`view` is the segment's memory. `wanted`: whether the node is to move chunks now. `open_transfer` makes the
    way to other segments, which is closed when there is nothing to move. The metadata client stays the caller's."""

    def __init__(
        self,
        view: memoryview,
        *,
        node: NodeInfo,
        metadata: MetadataClient,
        open_transfer: Callable[[], TransferEngine],
        wanted: Callable[[], bool],
        store: StoreConfig,
        clock: Clock,
        run_blocking: RunBlocking,
        limits: NodeLimits = NodeLimits(),
    ) -> None:
        self.work: PausableWork[bool] = PausableWork()
        """A batch, if one is under way. Its result: whether the next follows."""
        self.moved = 0
        """Chunks since start."""
        self.left: int | None = None
        """Chunks that lie nowhere else, as far as is known while the node is to move chunks."""
        self._view, self._node, self._metadata = view, node, metadata
        self._open_transfer, self._wanted, self._clock = open_transfer, wanted, clock
        self._run_blocking, self._limits = run_blocking, limits
        self._ttl_s = store.reserve_ttl_s
        self._placement = Placement(metadata, node_id=node.id, incarnation=node.incarnation, clock=clock, config=store)
        self._copied: dict[ChunkKey, None] = {}
        """Of which a copy was written, and which the metadata server was not told yet or has in use here."""

    def __repr__(self) -> str:
        return f"<ChunkMover {self.moved} moved, {self.left} left>"

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if self._wanted():
                await self._move_all()
            else:
                self.left = None
                if self._copied and (reply := await self._ask()) is not None and reply.moves:
                    await self._placement.give_back(Reserved({move.target.key: move.target for move in reply.moves}))
            await asyncio.sleep(self._limits.move_poll_s)

    async def aclose(self) -> None:
        """End what is under way, and wait for give-backs, bounded."""
        await self.work.aclose()
        await self._placement.aclose(self._limits.close_s)

    async def _move_all(self) -> None:
        """Batch after batch, until nothing is left or nothing has room; of the time, `move_share` at most."""
        transfer = self._open_transfer()
        try:
            while self._wanted():
                began = self._clock.now()
                if not await self.work.run(self._move_some(transfer)):
                    return
                spent_s = self._clock.now() - began
                await asyncio.sleep(spent_s * (1 / self._limits.move_share - 1))
        finally:
            await transfer.aclose()

    async def _move_some(self, transfer: TransferEngine) -> bool:
        """Whether to go on at once."""
        began = self._clock.now()
        reply = await self._ask()
        if reply is None:
            return False
        self.left = reply.left
        if not reply.moves:
            return reply.more
        granted = {move.target.key: move.target for move in reply.moves}
        moved = 0
        try:
            written = await self._write(transfer, reply, began + self._ttl_s * self._limits.move_writable_share)
            self._copied.update((copy.move.source.key, None) for copy in written)  # also if no answer says so
            answers = await self._placement.commit([copy.move.target.id for copy in written], self._limits.give_back_s)
            for copy, done in zip(written, answers or [], strict=False):
                del granted[copy.move.target.key]
                moved += done
        finally:
            await self._placement.give_back(Reserved(granted))
        self.moved += moved
        log_fields(_logger, logging.INFO, "moved", node=self._node.id, chunks=moved, left=self.left)
        return moved > 0 or reply.more

    async def _ask(self) -> MoveChunksReply | None:
        """What to move next; tells of what was copied. None: the metadata server does not say."""
        copied = list(islice(self._copied, self._limits.most_copied))
        request = MoveChunksRequest(
            node_id=self._node.id,
            incarnation=self._node.incarnation,
            copied=copied,
            most_bytes=self._limits.move_bytes,
            ttl_s=self._ttl_s,
        )
        try:
            if self._metadata.protocol < NODE_ORDERS:
                return None
            reply = await self._metadata.move_chunks(request)
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            log_fields(_logger, logging.INFO, "move_not_asked", node=self._node.id, reason=error.message)
            return None
        for key in copied:
            del self._copied[key]
        self._copied.update(dict.fromkeys(reply.in_use))
        return reply

    async def _write(self, transfer: TransferEngine, reply: MoveChunksReply, write_by: float) -> list[_Copy]:
        """Those whose copies are complete, and whose source was whole to the end."""
        # A header without the true checksum goes first, with the payload; the true one when all of it has landed and
        # the source was looked at again: what was overwritten while it was read never becomes a chunk.
        segments = {segment.id: segment for segment in reply.segments}
        copies = [
            copy
            for move in reply.moves
            if (segment := segments.get(move.target.segment_id)) is not None
            and (copy := self._copy_of(move, segment)) is not None
        ]
        copies = await self._send(transfer, copies, [copy.op(0, payload=True) for copy in copies], write_by)
        whole = await self._run_blocking(lambda: [copy for copy in copies if copy.is_whole()])
        return await self._send(
            transfer, whole, [copy.op(copy.header.checksum, payload=False) for copy in whole], write_by
        )

    async def _send(
        self, transfer: TransferEngine, copies: list[_Copy], ops: Sequence[TransferOp], write_by: float
    ) -> list[_Copy]:
        left_s = write_by - self._clock.now()
        if not ops or left_s <= 0:
            return []
        errors = await transfer.write(ops, left_s)
        return [copy for copy, error in zip(copies, errors, strict=True) if error is None]

    def _copy_of(self, move: ChunkMove, segment: Segment) -> _Copy | None:
        source, target = move.source, move.target
        memory = self._view[source.offset : source.offset + source.length]
        header = parse(memory[:HEADER_BYTES])
        if header is None or (header.key, header.generation) != (source.key, source.generation):
            return None
        if HEADER_BYTES + header.payload_length != source.length or source.length != target.length:
            return None
        return _Copy(move, segment, memory, replace(header, generation=target.generation))
