"""What this process keeps of answers of /v1/responses, for later requests to go on from: bounded, and apart by tenant.

Owns no form of an answer. Invariants: nobody finds what is another tenant's; a tenant that keeps much has its own
oldest put out first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from kvcore.clock import Clock
from kvcore.errors import ResponseNotFoundError
from kvcore.process.service import Lifecycle


@dataclass(frozen=True, slots=True)
class KeepLimits:
    """Bounds of what is kept, of all tenants together."""

    max_bytes: int = 64 << 20
    max_one_bytes: int = 8 << 20
    """A longer answer, with the conversation before it, is not kept, and says so: `store` is false."""
    max_count: int = 10_000
    max_age_s: float = 86_400.0


class KeptResponse(msgspec.Struct, frozen=True):
    """`body`: the answer's JSON; `items`: that of the conversation and its output, which is what comes before the next
    request's input."""

    body: bytes
    items: bytes
    at: float

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return len(self.body) + len(self.items)


class KeptResponses:
    """In this process's memory, and gone with it."""

    def __init__(self, clock: Clock, limits: KeepLimits = KeepLimits()) -> None:
        self._clock, self._limits = clock, limits
        self._order: dict[tuple[str, str], None] = {}
        """Tenant and id of each, the oldest first."""
        self._of: dict[str, dict[str, KeptResponse]] = {}
        """By tenant and id, the oldest first."""
        self._bytes: dict[str, int] = {}
        """By tenant."""

    def __repr__(self) -> str:
        return f"<KeptResponses {len(self._order)} of {len(self._of)} tenants, {sum(self._bytes.values())} bytes>"

    def __len__(self) -> int:
        return len(self._order)

    def put(self, tenant: str, response_id: str, body: bytes, items: bytes) -> bool:
        """Keep one, in the place of the tenant's own with that id. False: it is too long to be kept."""
        kept = KeptResponse(body, items, self._clock.now())
        if kept.num_bytes > self._limits.max_one_bytes:
            return False
        if (tenant, response_id) in self._order:
            self._drop(tenant, response_id)
        self._order[tenant, response_id] = None
        self._of.setdefault(tenant, {})[response_id] = kept
        self._bytes[tenant] = self._bytes.get(tenant, 0) + kept.num_bytes
        for old in self._to_go():
            self._drop(*old)
        return True

    def find(self, tenant: str, response_id: str, param: str = "response_id") -> KeptResponse:
        """Raises ResponseNotFoundError, naming `param`."""
        kept = self._of.get(tenant, {}).get(response_id)
        if kept is None or self._is_old(kept):
            raise not_kept(response_id, param)
        return kept

    def drop(self, tenant: str, response_id: str) -> None:
        """Forget one. Raises ResponseNotFoundError."""
        self.find(tenant, response_id)
        self._drop(tenant, response_id)

    def _drop(self, tenant: str, response_id: str) -> None:
        del self._order[tenant, response_id]
        gone = self._of[tenant].pop(response_id)
        self._bytes[tenant] -= gone.num_bytes
        if not self._of[tenant]:
            del self._of[tenant], self._bytes[tenant]

    def _to_go(self) -> Iterator[tuple[str, str]]:
        """Tenants and ids, each to be dropped before the next is asked for."""
        limits = self._limits
        while self._order:
            tenant, oldest = next(iter(self._order))
            if self._is_old(self._of[tenant][oldest]):
                yield tenant, oldest
            elif len(self._order) > limits.max_count or sum(self._bytes.values()) > limits.max_bytes:
                most = max(self._bytes, key=lambda name: self._bytes[name])
                yield most, next(iter(self._of[most]))
            else:
                return

    def _is_old(self, kept: KeptResponse) -> bool:
        return self._clock.now() - kept.at > self._limits.max_age_s


def keep_responses(others: Sequence[str], clock: Clock, lifecycle: Lifecycle) -> KeptResponses | None:
    """What a router's process keeps them in. None: it is one of several, and another may get the next request."""
    if others:
        return None
    kept = KeptResponses(clock)
    lifecycle.describe.append(lambda: [repr(kept)])
    return kept


def not_kept(response_id: str, param: str) -> ResponseNotFoundError:
    """That there is no such response, or none any more."""
    text = f"no response {response_id[:80]!r} is kept: it has gone, or never was (store)"
    return ResponseNotFoundError(f"{text}; send the whole conversation as input", param=param)
