"""Read leases as their reader keeps them: named, so that it can give back what it has not seen, and renewed while bytes
move.

Owns the names and the renewals. Invariant: a lease whose reply did not come, or which nobody took, is given back by its
name (`kvstore.give_back`); nothing but a transfer under way renews one.
"""

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from kvcore.clock import Clock
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.types import OwnerTag
from kvstore.background import Background
from kvstore.counters import Count, StoreCounters
from kvstore.give_back import GiveBack
from kvstore.limits import StoreLimits
from kvstore.types import Lease
from metadata_server.cache_messages import RenewRequest
from metadata_server.client import MetadataClient
from metadata_server.messages import NAMED_LEASES, OWNED_LEASES

_T = TypeVar("_T")


class ReaderLeases:
    """Of one store's readers, in their node's name."""

    def __init__(
        self,
        metadata: MetadataClient,
        *,
        node_id: str,
        incarnation: int,
        lease_s: float,
        clock: Clock,
        counters: StoreCounters,
        background: Background,
        give_back: GiveBack,
        limits: StoreLimits,
    ) -> None:
        """`lease_s`: how long one lasts."""
        self._metadata = metadata
        self._node_id = node_id
        self._incarnation = incarnation
        self.lease_s = lease_s
        self._clock = clock
        self._counters = counters
        self._background = background
        self._limits = limits
        self._names = itertools.count(1 + secrets.randbits(62))
        self._give_back = give_back

    def __repr__(self) -> str:
        return f"<ReaderLeases of {self._node_id}, {len(self._give_back)} to be given back>"

    @property
    def named(self) -> bool:
        """Whether the server knows names and renewals."""
        return self._metadata.protocol >= NAMED_LEASES

    def name(self) -> int | msgspec.UnsetType:
        """A new one; none for a server that does not know them."""
        return next(self._names) if self.named else msgspec.UNSET

    def reader(self, *, leased: bool, owner: OwnerTag | None) -> dict[str, Any]:
        """What a lookup says of its reader, and of the lease that it wants, to a server of any version."""
        knows = owner is not None and self._metadata.protocol >= OWNED_LEASES
        return {
            "lease_s": self.lease_s if leased else 0.0,
            "node_id": self._node_id,
            "incarnation": self._incarnation,
            "lease_name": self.name() if leased else msgspec.UNSET,
            "owner": owner if knows else msgspec.UNSET,
        }

    async def seen(self, name: int | msgspec.UnsetType, call: Awaitable[_T]) -> _T:
        """The reply to a call that may grant a lease, or room for chunks, of this name. If none comes, in time or as
        the caller is cancelled, what the server has granted, or will, is given back in the background."""
        tried = self._metadata.available
        try:
            return await call
        except (MetadataUnavailableError, asyncio.CancelledError):
            if tried and isinstance(name, int):
                self._give_back.unseen(name)
            raise

    def granted(self, lease_id: int) -> Lease | None:
        """As a reply says it; 0: there is none."""
        return Lease(lease_id, self._clock.now() + self.lease_s) if lease_id else None

    def give_back(self, lease: Lease | None) -> None:
        """In the background, together with what else is to be given back."""
        if lease is not None:
            self._give_back.lease(lease.id)

    @contextmanager
    def renewing(self, lease: Lease | None) -> Iterator[None]:
        """Bytes move under the lease: inside of the context it does not run out, as long as the server answers."""
        if lease is None or not self.named:
            yield
            return
        loop, timer = asyncio.get_running_loop(), list[asyncio.TimerHandle]()

        def renew_in(seconds: float) -> None:
            timer[:] = [loop.call_later(seconds, renew)]

        def renew() -> None:
            renew_in(self._renew_s)
            if lease.until > 0 and not self._background.full:
                self._background.spawn(self._renew(lease))

        renew_in(max(0.0, lease.until - self.lease_s + self._renew_s - self._clock.now()))
        try:
            yield
        finally:
            timer[0].cancel()

    @property
    def _renew_s(self) -> float:
        return self._limits.renew_share * self.lease_s

    async def _renew(self, lease: Lease) -> None:
        request = RenewRequest(
            node_id=self._node_id, incarnation=self._incarnation, lease_ids=[lease.id], lease_s=self.lease_s
        )
        began = self._clock.now()
        try:
            reply = await self._metadata.renew(request)
        except (MetadataUnavailableError, MetadataProtocolError):  # the next turn tries again
            return
        if reply.renewed == [True]:
            self._counters.add(Count.LEASES_RENEWED)
            lease.until = began + self.lease_s
        else:  # a new life of the server: what is read is verified, as always
            self._counters.add(Count.LEASES_LOST)
            lease.until = 0.0
