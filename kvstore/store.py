"""The distributed store: match, wait, get and put of chunks, with every chunk verified on read.

Owns no memory and no index: places come from the metadata server, bytes move by the transports. The cache never
decides correctness: whatever is missing, late, damaged or unreachable is a value that says "compute it".
"""

from collections.abc import Sequence

from metadata_server.client import MetadataClient

from kvcore.clock import Clock
from kvcore.config import StoreConfig
from kvcore.types import ChunkKey, KVSpec
from kvstore.put_session import PutSession
from kvstore.types import GetResult, Match, MovedBytes, RunBlocking
from transfer.base import TransferEngine


class KVStore:
    """The store as one process uses it. Close it with `aclose`; the metadata client and transports stay the caller's.

    `transfers` in order of preference (shm before tcp). `node_id` and `incarnation` name the node that the process
    belongs to: its reservations die with it, and its own segment is read first. `spec.chunk_bytes` is the payload of
    every chunk. `run_blocking` runs checksums over large payloads; a simulation passes `run_inline`.
    """

    def __init__(
        self,
        *,
        spec: KVSpec,
        node_id: str,
        incarnation: int,
        metadata: MetadataClient,
        transfers: Sequence[TransferEngine],
        clock: Clock,
        config: StoreConfig | None = None,
        verify: bool = True,
        run_blocking: RunBlocking | None = None,
    ) -> None:
        """Default `config`: StoreConfig(). `verify` False leaves the payload's checksum out of reads, never the header."""
        raise NotImplementedError

    async def match(self, keys: Sequence[ChunkKey], *, timeout_s: float) -> Match:
        """Longest prefix of `keys` that is complete. Metadata server away: an empty Match, counted, never an error.

        The Match holds a read lease until `release(match)` or its expiry (`config.read_lease_s`). A cancelled call
        leaves no lease behind.
        """
        raise NotImplementedError

    async def wait(self, keys: Sequence[ChunkKey], *, more_than: int, timeout_s: float) -> Match:
        """As `match`, answered once more than `more_than` leading keys are complete or time is up (then: whatever is
        complete, perhaps not more). Metadata server away: an empty Match at once; the caller paces its retries."""
        raise NotImplementedError

    async def get_into(
        self, match: Match, start: int, buffers: Sequence[Sequence[memoryview]], *, timeout_s: float
    ) -> GetResult:
        """Read chunks `start .. start + len(buffers)` of the match, each scattered over the views `buffers[i]` (payload
        only, `spec.chunk_bytes` together, writable, C-contiguous; not to be read before the call has returned).

        Every chunk is verified on the caller's copy; one that fails is read from its next replica while time is left,
        and what was wrong is reported to the metadata server in the background. Never raises for a chunk's sake.
        """
        raise NotImplementedError

    async def release(self, match: Match) -> None:
        """Give the match's lease back; bounded, never raises, and safe to call twice. The work survives cancellation."""
        raise NotImplementedError

    async def begin_put(self, keys: Sequence[ChunkKey], *, prefer_segment: str | None, timeout_s: float) -> PutSession:
        """Reserve room for all `keys` in one batch. Metadata away or store full: a session that accepts nothing.

        The caller must `aclose` the session. A cancelled call leaves no reservation behind.
        """
        raise NotImplementedError

    def counters(self) -> dict[str, int]:
        """A copy of the totals since start; names in `kvstore.counters`."""
        raise NotImplementedError

    def moved(self) -> list[MovedBytes]:
        """Totals since start, one entry a (transport, direction)."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """End background reports, bounded. Idempotent. Sessions must be closed before."""
        raise NotImplementedError
