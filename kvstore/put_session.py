"""One batch of reservations and what becomes of them: written, committed, given back."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvcore.types import ChunkKey
from kvstore.types import MovedBytes


class PutSession:
    """Made by `KVStore.begin_put`; use it as an async context manager or call `aclose`.

    Writes of different keys may run at the same time, and while a commit runs. `moved` grows by one entry a write.
    """

    moved: list[MovedBytes]

    def wants(self, key: ChunkKey) -> bool:
        """Whether `key` was granted and not yet written, failed or run out: its payload should be written."""
        raise NotImplementedError

    @property
    def complete(self) -> frozenset[ChunkKey]:
        """Keys that the store had already when the session began."""
        raise NotImplementedError

    async def write(self, key: ChunkKey, token_count: int, payload: Sequence[memoryview], *, timeout_s: float) -> bool:
        """Write header and payload (`spec.chunk_bytes` gathered from C-contiguous views, unchanged until this returns).

        False: not wanted, out of time, or the transfer failed (the reservation is given back then). Never raises
        TransferError. The chunk becomes visible by `commit`. A cancelled write gives the reservation back at `aclose`.
        """
        raise NotImplementedError

    async def commit(self, *, timeout_s: float) -> list[ChunkKey]:
        """Commit all that was written since the last commit, in one batch; returns the keys that are now visible.

        Metadata server away or reservation expired: the key is left out and counted; never raises for that.
        """
        raise NotImplementedError

    async def aclose(self) -> None:
        """Give back what was reserved and not committed. Idempotent, shielded from cancellation, bounded."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
