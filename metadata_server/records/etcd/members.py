"""Calls to the members of one etcd: whichever answers, within a deadline, as one user, over TLS where it is asked for.

Owns channels, the token, and what each of gRPC's errors means. A read goes to the next member when one does not answer;
a write does not, as it may have happened: whoever made it reads back.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from etcd3aio._protobuf import AuthenticateRequest, AuthStub, KVStub, LeaseStub, WatchStub

from kvcore.clock import Clock
from kvcore.errors import PayloadTooLargeError, RecordsUnavailableError
from metadata_server.records.etcd.access import EtcdAccess
from metadata_server.records.limits import RecordsLimits

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]
_NO_ANSWER = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
    )
)


class UnansweredError(RecordsUnavailableError):
    """Nobody knows whether a write has happened."""


@dataclass(frozen=True)
class Member:
    """One member's stubs. `metadata` goes with every call: the token of our user."""

    shown: str
    channel: Any
    kv: Any
    lease: Any
    watch: Any
    auth: Any


Call = Callable[[Member, float, Metadata], Awaitable[T]]
"""(member, seconds that it may take, metadata) -> the answer."""


class EtcdMembers:
    """All members of one etcd. Bound to one event loop; opens no connection before the first call."""

    def __init__(self, access: EtcdAccess, clock: Clock, limits: RecordsLimits) -> None:
        self._access = access
        self._clock = clock
        self._limits = limits
        self._members: list[Member] = []
        self._at = 0
        self._token: Metadata = ()
        self._authenticating = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<EtcdMembers {', '.join(self._access.hosts)}>"

    async def read(self, call: Call[T]) -> T:
        """The first answer of any member. Raises RecordsUnavailableError, and gRPC's error where that is an answer."""
        deadline = self._clock.now() + self._access.timeout_s
        while True:
            try:
                return await self.once(call, deadline - self._clock.now())
            except UnansweredError:
                if self._clock.now() >= deadline:
                    raise
                await asyncio.sleep(min(self._limits.etcd_pause_s, max(0.0, deadline - self._clock.now())))

    async def once(self, call: Call[T], timeout_s: float | None = None) -> T:
        """One member's answer. Raises UnansweredError: it may have done what it was asked, and another is next."""
        members = self._open()
        member = members[self._at % len(members)]
        most = self._access.timeout_s / min(2, len(members))  # a member that hangs leaves time for another
        limit_s = max(self._limits.etcd_least_s, most if timeout_s is None else min(most, timeout_s))
        for again in (True, False):
            if self._access.user and not self._token:  # else etcd takes us for whom our certificate names
                await self._authenticate(member, limit_s, ())
            token = self._token
            try:
                return await call(member, limit_s, token)
            except grpc.aio.AioRpcError as error:
                if again and self._access.user and _is_about_token(error):
                    await self._authenticate(member, limit_s, token)
                    continue
                if error.code() in _NO_ANSWER:
                    self.give_up(member)
                raise self._said(error, member) from error
        raise AssertionError("the second try returns or raises")

    def give_up(self, member: Member) -> None:
        """Another is asked next."""
        if self._members and self._members[self._at % len(self._members)] is member:
            self._at += 1

    @property
    def current(self) -> tuple[Member, Metadata]:
        """Who is asked next, for a stream; and what goes with it."""
        members = self._open()
        return members[self._at % len(members)], self._token

    async def aclose(self) -> None:
        """Close the channels. Idempotent."""
        members, self._members = self._members, []
        for member in members:
            await member.channel.close()

    def _open(self) -> list[Member]:
        if not self._members:
            self._members = [self._member(host) for host in self._access.hosts]
        return self._members

    def _member(self, host: str) -> Member:
        options = [
            ("grpc.enable_retries", 0),
            ("grpc.keepalive_time_ms", 10_000),  # etcd hangs up on whoever pings more often than each 5 s
            ("grpc.keepalive_timeout_ms", 3_000),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        ]
        access, target = self._access, f"dns:///{host}"
        if access.ca is None:
            channel = grpc.aio.insecure_channel(target, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(access.ca, access.key, access.cert)
            channel = grpc.aio.secure_channel(target, credentials, options=options)
        return Member(
            shown=host,
            channel=channel,
            kv=KVStub(channel),
            lease=LeaseStub(channel),
            watch=WatchStub(channel),
            auth=AuthStub(channel),
        )

    async def _authenticate(self, member: Member, limit_s: float, refused: Metadata) -> None:
        async with self._authenticating:
            if self._token != refused:  # somebody has done it meanwhile
                return
            request = AuthenticateRequest(name=self._access.user, password=self._access.password)
            try:
                reply = await member.auth.Authenticate(request, timeout=limit_s)
            except grpc.aio.AioRpcError as error:
                if error.code() in _NO_ANSWER:
                    self.give_up(member)
                    raise UnansweredError(f"etcd {member.shown}: {_why(error)}") from error
                raise RecordsUnavailableError(
                    f"etcd {member.shown} does not take user {self._access.user}: {_why(error)}"
                ) from error
            self._token = (("token", reply.token),)

    def _said(self, error: Any, member: Member) -> BaseException:
        """Our error for gRPC's; itself, where the caller must look at it."""
        code, why, shown = error.code(), _why(error), f"etcd {member.shown}"
        if code in _NO_ANSWER:
            return UnansweredError(f"{shown}: {why}")
        if "larger than max" in why or "too large" in why:
            return PayloadTooLargeError(f"{shown}: {why}; its --max-request-bytes decides")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return RecordsUnavailableError(f"{shown}: {why}; when its database is full: compact, defragment, disarm")
        if code is grpc.StatusCode.PERMISSION_DENIED or _is_about_token(error):
            who = f"user {self._access.user}" if self._access.user else "nobody; set metadata_server.records.user"
            return RecordsUnavailableError(f"{shown} refuses {who}: {why}")
        assert isinstance(error, BaseException)
        return error


def _why(error: grpc.aio.AioRpcError) -> str:
    code = error.code().name.lower().replace("_", " ")
    return f"{code}: {error.details()}" if error.details() else code


def _is_about_token(error: grpc.aio.AioRpcError) -> bool:
    """The call was not done, as who makes it is not known (any more): a member's tokens end when it is restarted."""
    why = error.details() or ""
    return error.code() is grpc.StatusCode.UNAUTHENTICATED or (
        error.code() is grpc.StatusCode.INVALID_ARGUMENT and ("user name is empty" in why or "auth store is old" in why)
    )
