"""One request inside the engine: its sequences, its stream, its jobs, its times. And when a sequence is finished.

Owns no decision about steps or blocks. Invariant: after `fail` or the last finish nothing is put into the stream.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from engines.jobs.load import as_moved
from engines.paged.connector import LoadJob, SaveJob
from engines.paged.sequence import Status, TokenSequence
from kvcore.errors import KVFerryError
from nodeapi.messages import FinishReason, Handoff, LegInfo, Moved, SamplingParams, Timings, TokenDelta

MAX_UNREAD = 256
"""Deltas that a slow reader may leave unread before its sequences are left out of steps."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """When sequences end, beside what their request says. `max_tokens`: prompt and output, by context and memory."""

    eos_token_ids: frozenset[int]
    max_tokens: int

    def reason(self, sequence: TokenSequence) -> FinishReason | None:
        """Why `sequence` is finished after its last token, or None."""
        params, num_output = sequence.sampling, len(sequence.tokens) - sequence.num_prompt
        assert params is not None
        if num_output > params.min_tokens and self.stops(params, sequence.tokens[-1]):
            return FinishReason.STOP
        if num_output >= params.max_tokens or len(sequence.tokens) >= self.max_tokens:
            return FinishReason.LENGTH
        return None

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
    timer: asyncio.TimerHandle | None = None
    load: LoadJob | None = None
    load_task: asyncio.Task[None] | None = None
    save: SaveJob | None = None
    save_task: asyncio.Task[None] | None = None
    scheduled: float | None = None
    started: float | None = None
    computed: float | None = None
    info_sent: bool = False

    @property
    def first(self) -> TokenSequence:
        """The sequence that computes the prompt."""
        return self.sequences[0]

    @property
    def finished(self) -> bool:
        """Whether every sequence is."""
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)

    @property
    def succeeded(self) -> bool:
        """Whether it ended as it should: a prefill with its chunks saved, a decode with each sequence finished."""
        if self.first.sampling is None:
            return self.done.done() and not self.done.cancelled() and self.done.exception() is None
        return self.finished and not self.done.done()

    def end_handoff(self) -> None:
        """Stop waiting for another node's chunks, now or before it began."""
        self.handoff = None
        if self.load is not None:
            self.load.stop_waiting()

    def set_paused(self) -> None:
        """Leave its sequences out of steps while too much is unread."""
        paused = self.stream.qsize() >= MAX_UNREAD
        for sequence in self.sequences:
            sequence.paused = paused

    def fail(self, error: KVFerryError) -> None:
        """Tell the reader."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # a decode leg's is never awaited
        self.stream.put_nowait(error)

    def info(self, now: float) -> LegInfo:
        """What it did before its first token."""
        return LegInfo(
            cached_tokens=self.first.num_cached or 0,
            computed_tokens=self.first.num_prompt_computed,
            moved=self.moved,
            timings=self.timings(now),
        )

    @property
    def moved(self) -> list[Moved]:
        """Bytes over its jobs, as far as they have got."""
        return as_moved([*(self.load.moved if self.load else []), *(self.save.moved if self.save else [])])

    def timings(self, now: float) -> Timings:
        """Where the time since its arrival went."""
        started = now if self.started is None else self.started
        return Timings(
            queue_s=(now if self.scheduled is None else self.scheduled) - self.arrived,
            wait_s=self.load.wait_s if self.load else 0.0,
            load_s=self.load.load_s if self.load else 0.0,
            compute_s=(now if self.computed is None else self.computed) - started,
            save_s=self.save.save_s if self.save else 0.0,
            total_s=now - self.arrived,
        )


def leading(keys: Sequence[bytes], stored: set[bytes]) -> int:
    """How many leading keys are in `stored`."""
    return next((index for index, key in enumerate(keys) if key not in stored), len(keys))
