"""One leg: a prefill or a generate request inside the engine, with its sequences, stream, jobs and times.

Owns no decision about steps or blocks. Invariant: after `fail` or the last finish nothing is put into the stream.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engines.jobs.context import as_moved
from engines.jobs.load import LoadJob
from engines.jobs.save import SaveJob
from engines.paged.sequence import Status, TokenSequence
from kvcore.errors import KVFerryError
from kvstore.types import MovedBytes
from nodeapi.messages import FinishReason, Handoff, LegInfo, Moved, PrefillResult, Timings, TokenDelta
from nodeapi.prompt_logprobs import PromptLogprobs
from nodeapi.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class StopRule:
    """When sequences end, beside what their request says. `max_tokens`: prompt and output, by context and memory."""

    eos_token_ids: frozenset[int]
    max_tokens: int

    def is_full(self, sequence: TokenSequence) -> bool:
        """Whether `sequence` has all the tokens that it may have."""
        assert sequence.sampling is not None
        num_output = len(sequence.tokens) - sequence.num_prompt
        return num_output >= sequence.sampling.max_tokens or len(sequence.tokens) >= self.max_tokens

    def reason(self, sequence: TokenSequence) -> FinishReason | None:
        """Why `sequence` is finished after its last token, or None."""
        params, num_output = sequence.sampling, len(sequence.tokens) - sequence.num_prompt
        assert params is not None
        if sequence.matcher is not None and sequence.matcher.ended:  # it drew the end, as nothing else could come
            return FinishReason.STOP
        if num_output > params.min_tokens and self.stops(params, sequence.tokens[-1]):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.is_full(sequence) else None

    def stops(self, params: SamplingParams, token: int) -> bool:
        """Whether `token` ends a completion."""
        return token in params.stop_token_ids or (not params.ignore_eos and token in self.eos_token_ids)


@dataclass(eq=False, slots=True)
class Leg:
    """A prefill or a decode leg. `done` is the prefill's end; `stream` the decode's deltas, ended by an error or by a
    finish reason for each index."""

    request_id: str
    arrived: float
    sequences: list[TokenSequence]
    handoff: Handoff | None = None
    prefer_segment: str | None = None
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    stream: asyncio.Queue[TokenDelta | KVFerryError] = field(default_factory=asyncio.Queue)
    deadline_timer: asyncio.TimerHandle | None = None
    load: LoadJob | None = None
    load_task: asyncio.Task[None] | None = None
    save: SaveJob | None = None
    save_task: asyncio.Task[None] | None = None
    saves: bool = True
    """Whether what it computes goes into the store."""
    documents_task: asyncio.Task[None] | None = None
    """Gets its documents, while its sequence is held."""
    stop_waiting: list[Callable[[], None]] = field(default_factory=list)
    """Of its documents that are waited for."""
    kept: list[int] | None = None
    """Of a document, or of a comparison: the blocks of its sequence, with one reference more each, once it has ended.
    None: they are given back."""
    prepared_tokens: int = 0
    """Computed for it, of documents that were nowhere yet."""
    moved_documents: list[MovedBytes] = field(default_factory=list)
    documents_s: float = 0.0
    """How long its documents were got, all at a time ..."""
    documents_load_s: float = 0.0
    """... and the longest load of one of them."""
    distributions: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """One a token, where whole ones are wanted."""
    scheduled: float | None = None
    """When its load or its first step was planned. Like the other times by Clock.now; None: not yet."""
    started: float | None = None
    """When its first step began."""
    computed: float | None = None
    """When the prompt was computed."""
    no_room: bool = False
    """A prefill's: the store had no room for what it would have computed."""
    info_sent: bool = False
    scores: list[PromptLogprobs] = field(default_factory=list)
    """Logprobs of the prompt's tokens that were not told yet."""

    def __repr__(self) -> str:
        kind = "prefill" if self.is_prefill else "decode"
        jobs = ", ".join(repr(job) for job in (self.load, self.save) if job is not None)
        return f"<Leg {kind} {self.request_id}: {self.sequences!r}{', ' * bool(jobs)}{jobs}>"

    @property
    def is_prefill(self) -> bool:
        """Whether only the KV is wanted."""
        return self.first.sampling is None

    @property
    def first(self) -> TokenSequence:
        """The sequence that computes the prompt."""
        return self.sequences[0]

    @property
    def unfinished_indices(self) -> list[int]:
        """Which completions have not ended."""
        return [index for s in self.sequences if s.status is not Status.FINISHED for index in s.indices]

    @property
    def finished(self) -> bool:
        """Whether every sequence is."""
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)

    @property
    def succeeded(self) -> bool:
        """Whether it ended as it should: a prefill with its chunks saved, a decode with each sequence finished."""
        if self.is_prefill:
            return self.done.done() and not self.done.cancelled() and self.done.exception() is None
        return self.finished and not self.done.done()

    def end_handoff(self) -> None:
        """Stop waiting for another node's chunks, now or before it began."""
        self.handoff = None
        self.first.awaits_handoff = False
        if self.load is not None:
            self.load.stop_waiting()
        for stop in self.stop_waiting:
            stop()

    def update_paused(self, max_unread: int) -> None:
        """Leave its sequences out of steps while `max_unread` deltas or more are unread."""
        paused = self.stream.qsize() >= max_unread
        for sequence in self.sequences:
            sequence.paused = paused

    def set_saved(self) -> None:
        """A prefill's chunks are saved, or were declined. Nothing happens to one that has failed, or to a decode."""
        if self.is_prefill and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: KVFerryError) -> None:
        """Tell the reader."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # a decode leg's is never awaited
        self.stream.put_nowait(error)

    def result(self, stored_chunks: int, now: float) -> PrefillResult:
        """What a prefill did, once it has ended."""
        return PrefillResult(
            request_id=self.request_id,
            cached_tokens=self.first.num_cached or 0,
            computed_tokens=self.first.num_prompt_computed,
            stored_chunks=stored_chunks,
            no_room=self.no_room,
            moved=self.moved,
            timings=self.timings(now),
        )

    def info_once(self, now: float) -> LegInfo | None:
        """What it did before its first token, for its first delta; None: it was told."""
        if self.info_sent:
            return None
        self.info_sent = True
        return self.info(now)

    def info(self, now: float) -> LegInfo:
        """What it did before its first token."""
        return LegInfo(
            cached_tokens=self.first.num_cached or 0,
            computed_tokens=self.first.num_prompt_computed,
            approximate_tokens=self.first.num_approximate,
            prepared_tokens=self.prepared_tokens,
            moved=self.moved,
            timings=self.timings(now),
        )

    @property
    def moved(self) -> list[Moved]:
        """Bytes over its jobs, as far as they have got."""
        jobs = [*(self.load.moved if self.load else []), *(self.save.moved if self.save else [])]
        return as_moved([*self.moved_documents, *jobs])

    def timings(self, now: float) -> Timings:
        """Where the time since its arrival went. Of that for its documents, what was no loading was waiting: for
        another node, or for this one's own steps that compute them."""
        started = now if self.started is None else self.started
        documents_load_s = min(self.documents_load_s, self.documents_s)
        return Timings(
            queue_s=max(0.0, (now if self.scheduled is None else self.scheduled) - self.arrived - self.documents_s),
            wait_s=(self.load.wait_s if self.load else 0.0) + self.documents_s - documents_load_s,
            load_s=(self.load.load_s if self.load else 0.0) + documents_load_s,
            compute_s=(now if self.computed is None else self.computed) - started,
            save_s=self.save.save_s if self.save else 0.0,
            total_s=now - self.arrived,
        )
