"""A watch in etcd that ends with its reader only: whenever its stream ends it begins anew, with all that is there.

etcd tells of a revision that was compacted with one answer (`canceled`) and is silent from then on. A member that has
lost the others would be silent, too: streams ask for a member that has a leader.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc.aio
from etcd3aio._protobuf import WatchCreateRequest, WatchRequest

from kvcore.errors import RecordsUnavailableError
from metadata_server.records.base import Listing, Record, RecordsUpdate
from metadata_server.records.etcd.members import EtcdMembers
from metadata_server.records.limits import RecordsLimits

_DELETE = 1
_HAS_LEADER = ("hasleader", "true")


class EtcdWatch:
    """Of the keys in `span` (start, end)."""

    def __init__(
        self, members: EtcdMembers, span: tuple[bytes, bytes], closing: asyncio.Event, limits: RecordsLimits
    ) -> None:
        self._members = members
        self._span = span
        self._closing = closing
        self._limits = limits

    async def updates(
        self, listing: Callable[[], Awaitable[Listing]], record: Callable[[Any], Record]
    ) -> AsyncIterator[RecordsUpdate]:
        """See Records.watch. Ends when `closing` is set."""
        while not self._closing.is_set():
            with suppress(RecordsUnavailableError):  # nobody answers now
                found = await listing()
                yield RecordsUpdate(reset=True, records=found.records, gone=(), revision=found.revision)
                async for events in self._stream(found.revision + 1):
                    yield _update(events, record)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._limits.etcd_pause_s)

    async def _stream(self, revision: int) -> AsyncIterator[Any]:
        """Changes, as they come. Ends when the member does, when the revision was compacted, and when all is closed."""
        member, token = self._members.current
        create = WatchCreateRequest(key=self._span[0], range_end=self._span[1], start_revision=revision)

        async def requests() -> AsyncIterator[Any]:
            yield WatchRequest(create_request=create)
            await asyncio.Event().wait()  # an end would end the stream

        stream = member.watch.Watch(requests(), metadata=(*token, _HAS_LEADER))
        closing = asyncio.ensure_future(self._closing.wait())
        reading: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            while True:
                reading = asyncio.ensure_future(stream.read())
                await asyncio.wait({reading, closing}, return_when=asyncio.FIRST_COMPLETED)
                if self._closing.is_set():
                    return
                reply = reading.result()
                if reply is grpc.aio.EOF or reply.canceled:
                    return
                if reply.events:
                    yield reply.events
        except grpc.aio.AioRpcError:
            self._members.give_up(member)
        finally:
            reading.cancel()
            closing.cancel()
            stream.cancel()


def _update(events: Any, record: Callable[[Any], Record]) -> RecordsUpdate:
    """Of several changes of one key, the last."""
    last = {bytes(event.kv.key): event for event in events}
    written = tuple(record(event.kv) for event in last.values() if event.type != _DELETE)
    gone = tuple(record(event.kv).key for event in last.values() if event.type == _DELETE)
    return RecordsUpdate(reset=False, records=written, gone=gone, revision=events[-1].kv.mod_revision)
