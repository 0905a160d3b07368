"""`Records` in etcd. Every write is one transaction on the revision that its key has.

A value is stored with a line of its own behind it: 16 random digits that name the write. A write without an answer is
looked for by them. As each names the revision that it stands on, one that arrives late, or twice, changes nothing.
"""

import asyncio
import logging
import math
import re
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from etcd3aio._protobuf import (
    Compare,
    DeleteRangeRequest,
    LeaseGrantRequest,
    LeaseKeepAliveRequest,
    LeaseRevokeRequest,
    PutRequest,
    RangeRequest,
    RequestOp,
    TxnRequest,
)

from kvcore.clock import Clock
from kvcore.errors import ConfigError, NotLeaderError, RecordsUnavailableError
from kvcore.telemetry import log_fields
from metadata_server.records.base import (
    ABSENT,
    NO_LEASE,
    Guard,
    Listing,
    PutOutcome,
    PutReply,
    Record,
    RecordsUpdate,
    check_record,
)
from metadata_server.records.etcd.access import EtcdAccess
from metadata_server.records.etcd.members import EtcdMembers, Member, Metadata, UnansweredError
from metadata_server.records.etcd.watch import EtcdWatch
from metadata_server.records.limits import RecordsLimits

_logger = logging.getLogger("metadata_server")
_MARK = re.compile(rb"\n[0-9a-f]{16}\Z")


async def open_etcd(access: EtcdAccess, clock: Clock, limits: RecordsLimits = RecordsLimits()) -> "EtcdRecords":
    """Once a member answers, which is waited for. Raises ConfigError if it refuses us."""
    records, told = EtcdRecords(access, clock, limits), False
    try:
        while True:
            try:
                await records.get("")
                return records
            except UnansweredError as error:
                if not told:
                    log_fields(_logger, logging.WARNING, "etcd_away", reason=error.message, effect="waiting for it")
                told = True
                await asyncio.sleep(limits.etcd_pause_s)
    except RecordsUnavailableError as error:
        await records.aclose()
        raise ConfigError(f"metadata_server.records: {error.message}") from error
    except BaseException:
        await records.aclose()
        raise


class EtcdRecords:
    """Bound to one event loop."""

    def __init__(self, access: EtcdAccess, clock: Clock, limits: RecordsLimits = RecordsLimits()) -> None:
        self._access = access
        self._clock = clock
        self._limits = limits
        self._members = EtcdMembers(access, clock, limits)
        self._closing = asyncio.Event()

    def __repr__(self) -> str:
        return f"<EtcdRecords below {self._access.prefix}: {self._members}>"

    async def run(self) -> None:
        """See Records: etcd keeps itself going."""
        await asyncio.Event().wait()

    async def get(self, key: str) -> Record | None:
        """See Records."""
        self._check_open()
        return self._record_of(await self._range(self._named(key)))

    async def listing(self, prefix: str) -> Listing:
        """See Records. In pages, all of one revision; again from the first when that was compacted meanwhile."""
        self._check_open()
        while True:
            try:
                return await self._pages(prefix)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.OUT_OF_RANGE:
                    raise _unknown(error) from error

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        expect: int | None = None,
        lease: int = NO_LEASE,
        guard: Guard | None = None,
    ) -> PutReply:
        """See Records."""
        self._check_open()
        check_record(key, value, self._limits)
        mark = b"\n" + secrets.token_hex(8).encode()
        put = RequestOp(request_put=PutRequest(key=self._named(key), value=value + mark, lease=lease))
        deadline = self._clock.now() + self._access.timeout_s
        while True:
            known = expect if expect is not None else _revision(await self.get(key))
            try:
                reply = await self._txn(key, known, put, guard)
            except UnansweredError as error:
                found = await self._range(self._named(key))
                there = self._record_of(found)
                if found.kvs and found.kvs[0].value.endswith(mark):
                    return PutReply(outcome=PutOutcome.WRITTEN, record=there)
                if expect is not None and _revision(there) != known:  # it may have been there in between
                    raise RecordsUnavailableError(f"{error.message}; whether it wrote {key} is not known") from error
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return PutReply(outcome=PutOutcome.LEASE_ENDED, record=await self.get(key))
                raise _unknown(error) from error
            else:
                if reply.succeeded:
                    record = Record(key=key, value=bytes(value), revision=reply.header.revision, lease=lease)
                    return PutReply(outcome=PutOutcome.WRITTEN, record=record)
                there = self._judge(reply, guard)
                if expect is not None:
                    return PutReply(outcome=PutOutcome.CONFLICT, record=there)
            self._check_time(deadline, key)

    async def delete(self, key: str, *, expect: int | None = None, guard: Guard | None = None) -> bool:
        """See Records."""
        self._check_open()
        remove = RequestOp(request_delete_range=DeleteRangeRequest(key=self._named(key)))
        deadline = self._clock.now() + self._access.timeout_s
        while True:
            known = expect if expect is not None else _revision(await self.get(key))
            try:
                reply = await self._txn(key, known, remove, guard)
            except UnansweredError as error:
                there = await self.get(key)
                if expect is None and there is None:
                    return known != ABSENT
                if expect is not None and _revision(there) != known:  # by this removal or by another hand
                    raise RecordsUnavailableError(f"{error.message}; whether it removed {key} is not known") from error
            except grpc.aio.AioRpcError as error:
                raise _unknown(error) from error
            else:
                if reply.succeeded:
                    return bool(reply.responses[0].response_delete_range.deleted)
                self._judge(reply, guard)
                if expect is not None:
                    return False
            self._check_time(deadline, key)

    async def grant(self, ttl_s: float) -> int:
        """See Records. Whole seconds, and no less than etcd allows (two, as it is set up by default)."""
        self._check_open()
        lease, ttl = secrets.randbits(62) + 1, max(1, math.ceil(ttl_s))

        async def call(member: Member, timeout_s: float, metadata: Metadata) -> None:
            request = LeaseGrantRequest(TTL=ttl, ID=lease)
            try:
                await member.lease.LeaseGrant(request, timeout=timeout_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:  # it exists: an earlier try made it
                    raise

        await self._read(call)
        return lease

    async def renew(self, lease: int) -> bool:
        """See Records."""
        self._check_open()

        async def one() -> AsyncIterator[Any]:
            yield LeaseKeepAliveRequest(ID=lease)

        async def call(member: Member, timeout_s: float, metadata: Metadata) -> bool:
            stream = member.lease.LeaseKeepAlive(one(), timeout=timeout_s, metadata=metadata)
            try:
                reply = await stream.read()
            finally:
                stream.cancel()
            if reply is grpc.aio.EOF:
                raise UnansweredError(f"etcd {member.shown} ended the renewal of a lease")
            return bool(reply.TTL > 0)

        return bool(await self._read(call))

    async def revoke(self, lease: int) -> None:
        """See Records."""
        self._check_open()

        async def call(member: Member, timeout_s: float, metadata: Metadata) -> None:
            try:
                await member.lease.LeaseRevoke(LeaseRevokeRequest(ID=lease), timeout=timeout_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise

        await self._read(call)

    async def watch(self, prefix: str) -> AsyncIterator[RecordsUpdate]:
        """See Records."""
        self._check_open()
        start = self._named(prefix)
        watch = EtcdWatch(self._members, (start, _end(start)), self._closing, self._limits)
        async for update in watch.updates(lambda: self.listing(prefix), self._record):
            yield update

    async def aclose(self) -> None:
        """See Records."""
        self._closing.set()
        await self._members.aclose()

    # --- inside ----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise RecordsUnavailableError("the records are closed")

    def _check_time(self, deadline: float, key: str) -> None:
        if self._clock.now() >= deadline:
            raise RecordsUnavailableError(f"{key} is written by so many that no write of ours came through")

    def _named(self, key: str) -> bytes:
        return (self._access.prefix + key).encode()

    def _record(self, pair: Any) -> Record:
        value = bytes(pair.value)
        if _MARK.search(value):  # what another hand has put there has none
            value = value[:-17]
        key = pair.key.decode("utf-8", "replace").removeprefix(self._access.prefix)
        return Record(key=key, value=value, revision=pair.mod_revision, lease=pair.lease)

    def _record_of(self, reply: Any) -> Record | None:
        return self._record(reply.kvs[0]) if reply.kvs else None

    async def _read(self, call: Any) -> Any:
        try:
            return await self._members.read(call)
        except grpc.aio.AioRpcError as error:
            raise _unknown(error) from error

    async def _range(self, key: bytes) -> Any:
        return await self._read(
            lambda member, timeout_s, metadata: member.kv.Range(
                RangeRequest(key=key), timeout=timeout_s, metadata=metadata
            )
        )

    async def _pages(self, prefix: str) -> Listing:
        start = self._named(prefix)
        end, found, revision = _end(start), list[Record](), 0
        while True:
            request = RangeRequest(key=start, range_end=end, limit=self._limits.etcd_page, revision=revision)
            reply = await self._members.read(
                lambda member, timeout_s, metadata, request=request: member.kv.Range(  # type: ignore[misc]
                    request, timeout=timeout_s, metadata=metadata
                )
            )
            revision = revision or reply.header.revision
            found += [self._record(pair) for pair in reply.kvs]
            if not reply.more:
                return Listing(records=tuple(found), revision=revision)
            start = bytes(reply.kvs[-1].key) + b"\0"

    async def _txn(self, key: str, known: int, operation: Any, guard: Guard | None) -> Any:
        """Do it if the key is at revision `known` and the guard holds; else read both."""
        compare = [_at_revision(self._named(key), known)]
        otherwise = [RequestOp(request_range=RangeRequest(key=self._named(key)))]
        if guard is not None:
            compare.append(_at_revision(self._named(guard.key), guard.revision))
            otherwise.append(RequestOp(request_range=RangeRequest(key=self._named(guard.key))))
        request = TxnRequest(compare=compare, success=[operation], failure=otherwise)
        return await self._members.once(
            lambda member, timeout_s, metadata: member.kv.Txn(request, timeout=timeout_s, metadata=metadata)
        )

    def _judge(self, reply: Any, guard: Guard | None) -> Record | None:
        """What is there instead. Raises NotLeaderError where it is the guard that does not hold."""
        if guard is not None:
            held = reply.responses[1].response_range
            if not held.kvs or held.kvs[0].mod_revision != guard.revision:
                raise NotLeaderError(f"the record {guard.key} is no longer at revision {guard.revision}")
        return self._record_of(reply.responses[0].response_range)


def _at_revision(key: bytes, revision: int) -> Any:
    return Compare(key=key, target=Compare.MOD, result=Compare.EQUAL, mod_revision=revision)


def _revision(record: Record | None) -> int:
    return ABSENT if record is None else record.revision


def _end(start: bytes) -> bytes:
    """The first key behind all that begin with `start`, which ends with a character of UTF-8: never 0xFF."""
    return start[:-1] + bytes([start[-1] + 1])


def _unknown(error: grpc.aio.AioRpcError) -> RecordsUnavailableError:
    return RecordsUnavailableError(f"etcd answered {error.code().name}: {error.details()}")
