"""What the scheduler half knows of one live request, the phases that it goes through, and who waits for whose load.

| phase   | call of vLLM's          | next    | meaning                                              |
|---------|-------------------------|---------|------------------------------------------------------|
| WAITING | matched                 | WAITING | asked how much can be loaded                         |
| WAITING | allocated, to load      | LOADING | a LoadOrder goes out with the next step              |
| WAITING | allocated, to compute   | RUNNING | there is nothing to load                             |
| WAITING | preempted               | WAITING | it had its blocks taken before `matched` was called  |
| LOADING | matched                 | WAITING | nothing of the load came                             |
| LOADING | allocated, to compute   | RUNNING | the load has ended; how far it came shows in `build` |
| LOADING | preempted               | WAITING | its blocks are taken                                 |
| RUNNING | matched                 | WAITING | it was preempted between two steps                   |
| RUNNING | allocated, to compute   | RUNNING | it goes on                                           |
| RUNNING | preempted               | WAITING | its blocks are taken                                 |
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.orders import LegParams
from engines.vllm.connector.request_chunks import RequestChunks
from kvcore.clock import Clock
from kvcore.types import ChunkKey


class LoadPhase(enum.Enum):
    """Where a request stands."""

    WAITING = "WAITING"
    LOADING = "LOADING"
    RUNNING = "RUNNING"


class SchedulerCall(enum.Enum):
    """What vLLM's scheduler did with a request."""

    MATCHED = "matched"
    ALLOCATED_TO_LOAD = "allocated, to load"
    ALLOCATED_TO_COMPUTE = "allocated, to compute"
    PREEMPTED = "preempted"


_W, _L, _R = LoadPhase.WAITING, LoadPhase.LOADING, LoadPhase.RUNNING
TRANSITIONS = {
    (_W, SchedulerCall.MATCHED): _W,
    (_W, SchedulerCall.ALLOCATED_TO_LOAD): _L,
    (_W, SchedulerCall.ALLOCATED_TO_COMPUTE): _R,
    (_W, SchedulerCall.PREEMPTED): _W,
    (_L, SchedulerCall.MATCHED): _W,
    (_L, SchedulerCall.ALLOCATED_TO_COMPUTE): _R,
    (_L, SchedulerCall.PREEMPTED): _W,
    (_R, SchedulerCall.MATCHED): _W,
    (_R, SchedulerCall.ALLOCATED_TO_COMPUTE): _R,
    (_R, SchedulerCall.PREEMPTED): _W,
}


@dataclass(frozen=True, slots=True)
class RequestView:
    """What the half knows of a request of vLLM's."""

    request_id: str
    token_ids: Sequence[int]
    """Prompt and output so far: vLLM's own list, which grows. Tokens that are not sampled yet are not in it."""
    num_prompt_tokens: int
    params: LegParams | None
    salt: bytes
    cacheable: bool
    """False: its KV depends on more than its tokens and its salt (images, prompt embeddings, an adapter that the salt
    does not name, ...). Never loaded nor saved."""
    wants_logits: bool = False
    """Of its whole prompt: nothing of it is loaded, as KV has none."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's part in the step that is about to run."""

    request_id: str
    num_computed_tokens: int
    """Before the step."""
    num_scheduled_tokens: int
    block_ids: Sequence[int]
    """Its whole block table."""


@dataclass(slots=True)
class LiveRequest:
    """Changed by the scheduler half alone."""

    view: RequestView
    chunks: RequestChunks
    may_load: bool
    """False for a request that is not cacheable, and after a load failed."""
    handoff: bool
    """A prefiller computes its chunks, and it has no blocks yet to load them into."""
    phase: LoadPhase = LoadPhase.WAITING
    asked: bool = False
    """A lookup was started for it."""
    num_asked: int = 0
    """Chunks in that lookup."""
    waited: bool = False
    """vLLM's scheduler has waited for that lookup once."""
    answered: bool = False
    num_local: int = 0
    """Tokens of vLLM's own prefix cache, as of the last `matched`."""
    load_end: int = 0
    """Tokens that will be good if the load under way succeeds. 0: none is, or its end was seen."""
    num_stored: int = 0
    """Leading chunks that are complete in the store without a save of this request."""
    num_offered: int = 0
    """Leading chunks that are stored or ordered to be saved."""
    tail_offered: bool = False
    saving: bool = False
    """A SaveOrder was given to the worker halves since the last preemption."""
    preempted_early: bool = False
    """`matched` has shown a preemption that `build` is still to list."""
    outdated: bool = False
    """It holds KV from before a reset: nothing of it is saved."""
    loading: Sequence[ChunkKey] = ()
    """Chunks of the load under way."""
    load_waits: bool = False
    """That load waits for a prefiller."""
    follows: str | None = None
    """The request whose load it waits for, or waited for last."""
    followed_at: int | None = None
    """`num_local` when it began that wait."""
    follow_until: float | None = None
    """When it ceases to wait for loads of others, whatever comes of them."""

    def __repr__(self) -> str:
        load = f", load to {self.load_end}" if self.load_end else ""
        return (
            f"<LiveRequest {self.view.request_id} {self.phase.value}, {len(self.view.token_ids)} tokens, "
            f"{self.num_stored} chunks stored, {self.num_offered} offered{load}>"
        )

    def enter(self, call: SchedulerCall) -> None:
        """Go into the phase that the call leads to."""
        following = TRANSITIONS.get((self.phase, call))
        assert following is not None, f"vLLM's scheduler: {call.value} while {self!r}"
        self.phase = following

    def load_ended(self, num_tokens: int) -> None:
        """So many leading tokens are good now."""
        failed = num_tokens < min(self.load_end, len(self.view.token_ids) - 1)  # the last one is computed in any case
        if failed:
            self.may_load = False
        self.num_stored = self.num_offered = (num_tokens if failed else self.load_end) // self.chunks.chunk_tokens
        self.load_end = 0

    def lose_blocks(self) -> None:
        """It was preempted. Its chunks may be in the store by now; saves of them may have been cancelled."""
        self.asked = self.answered = self.waited = False
        self.load_end = self.num_stored = self.num_offered = 0
        self.tail_offered = self.saving = False


class SharedLoads:
    """Who loads which chunk, and who waits for that instead of loading it too. Of a vLLM with a prefix cache.

    A request follows another one that loads the first chunk which it lacks. It holds no blocks meanwhile, so that no
    two can wait for each other, and then finds the chunks in vLLM's own cache. It loads by itself instead:

    1. The load has failed. What the request finds has not grown since it began to wait, and it does not wait again.
    2. It has waited `limits.follow_s` in all.
    3. The load waits for a prefiller, and does not end with the chunk that the request itself ends with: its own
       chunks may come earlier.

    Of a load that was given up (aborted, preempted) nothing is known: its followers may follow another one.
    """

    def __init__(self, limits: ConnectorLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._leaders: dict[ChunkKey, LiveRequest] = {}

    def __repr__(self) -> str:
        return f"<SharedLoads of {len({id(leader) for leader in self._leaders.values()})} requests>"

    def begin(self, leader: LiveRequest, keys: Sequence[ChunkKey], *, waits: bool) -> None:
        """It loads these chunks from now on."""
        leader.loading, leader.load_waits = keys, waits
        self._leaders.update(dict.fromkeys(keys, leader))

    def end(self, leader: LiveRequest) -> None:
        """It loads no more, if it did."""
        for key in leader.loading:
            if self._leaders.get(key) is leader:
                del self._leaders[key]
        leader.loading = ()

    def give_up(self, leader: LiveRequest, requests: Iterable[LiveRequest]) -> None:
        """As `end`, of a load that came to no end. `requests`: all, its followers among them."""
        if leader.loading:
            self.end(leader)
            for request in requests:
                if request.follows == leader.view.request_id:
                    request.follows = request.followed_at = None

    def must_wait(self, request: LiveRequest, first: ChunkKey, last: ChunkKey) -> bool:
        """Whether to wait for another one's load before loading `first` to `last`."""
        leader = self._leaders.get(first)
        if leader is None or (leader.load_waits and leader.loading[-1] != last):
            return False
        again = request.follows == leader.view.request_id
        if not again and request.followed_at is not None and request.num_local <= request.followed_at:
            return False
        now = self._clock.now()
        if request.follow_until is None:
            request.follow_until = now + self._limits.follow_s
        if now >= request.follow_until:
            return False
        if not again:
            request.follows, request.followed_at = leader.view.request_id, request.num_local
        return True
