"""What the engine's front and the connector's worker halves send each other over the engine's Unix socket.

Tagged msgpack structs, one a frame (`nodeapi.frames`). A worker half speaks first (WorkerHello). Its frames may have
fields that the front does not know; the front's orders may not.
"""

import msgspec

from kvcore.types import KVSpec
from nodeapi.messages import Moved

BUS_PROTOCOL = 1


class _Report(msgspec.Struct, frozen=True, kw_only=True):
    pass


class _Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class WorkerHello(_Report, frozen=True, kw_only=True, tag="hello"):
    """A worker half is ready: its rank, and the provenance of its KV as it was measured."""

    protocol: int = BUS_PROTOCOL
    spec: KVSpec
    """`tp_rank` and `tp_size` say which of how many."""


class LoadEnded(_Report, frozen=True, kw_only=True, tag="load_ended"):
    """A leg's LoadOrder ended, on one rank. `num_chunks`: leading chunks of the prompt that are good now."""

    leg: str
    rank: int
    first_chunk: int
    num_chunks: int
    num_tokens: int
    """Leading tokens that are good now, those of a tail included."""
    wait_s: float
    load_s: float
    moved: list[Moved] = []


class SaveEnded(_Report, frozen=True, kw_only=True, tag="save_ended"):
    """All saves of a leg ended, on one rank: committed or declined. `num_chunks`: leading chunks of the prompt that are
    complete in the store, as far as this leg knows."""

    leg: str
    rank: int
    num_chunks: int
    save_s: float
    moved: list[Moved] = []


class WorkerSample(_Report, frozen=True, kw_only=True, tag="sample"):
    """One rank's totals and gauges, sent on AskSample."""

    rank: int
    loading: int
    pending_saves: int
    counters: dict[str, int] = {}
    """As EngineStats.counters: chunks_loaded, chunks_stored, chunk_miss_<reason>, ..."""
    store: dict[str, int] = {}
    """As process_messages.Sample.store."""
    transports: dict[str, str] = {}


FromWorker = WorkerHello | LoadEnded | SaveEnded | WorkerSample


class BusEndHandoff(_Order, frozen=True, kw_only=True, tag="end_handoff"):
    """The leg's prefill has ended: take what is in the store now and stop waiting. Also for a leg not seen yet."""

    leg: str


class AskSample(_Order, frozen=True, kw_only=True, tag="ask_sample"):
    """Answered by WorkerSample."""


ToWorker = BusEndHandoff | AskSample
