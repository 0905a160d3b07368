"""What is under way to get documents into the engine's blocks: one errand for each, for all requests that want it.

Owns who wants what, and ends what nobody wants any more. How a document is got is the desk's.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from engines.jobs.load import LoadJob
from engines.paged.sequence import PlacedDocument
from engines.paged.store_jobs import ChunkClaim
from kvcore.types import ChunkKey
from kvstore.types import MovedBytes
from nodeapi.messages import GenerateRequest, PrefillRequest


@dataclass(slots=True)
class BroughtDocument:
    """What came of one. `ready`: its chunks were found in blocks when it ended."""

    ready: bool = False
    computed: int = 0
    """Tokens, those of the header that were not cached included ..."""
    computing: tuple[float, float] | None = None
    """... between these two times (Clock.now)."""
    load_s: float = 0.0
    moved: list[MovedBytes] = field(default_factory=list)
    save: "asyncio.Task[frozenset[ChunkKey]] | None" = None
    """Of what was computed: the keys that are complete in the store then."""


@dataclass(eq=False, slots=True)
class Errand:
    """One document that is being got. `request`: the first that wanted it. `waits`: for another node's chunks, until
    `until` (Clock.now), and nothing is computed."""

    document: PlacedDocument
    request: PrefillRequest | GenerateRequest
    waits: bool
    until: float = 0.0
    wanted: int = 0
    """So many requests do."""
    task: "asyncio.Task[BroughtDocument] | None" = None
    load: LoadJob | None = None
    follows: bool = True
    """What another node computes is waited for, before it is computed here."""
    claim: ChunkClaim | None = None
    """To compute its chunks, once there is a place among those that are computed."""
    stored: bool = False
    """The claim found that another node has computed them meanwhile."""
    places: asyncio.Semaphore | None = None
    """Where it has such a place."""
    told: bool = False
    stopped: bool = False

    def wait_until(self, until: float) -> None:
        """One more that waits, so long."""
        self.until = max(self.until, until)
        if self.load is not None:
            self.load.wait_until(self.until)

    def stop_waiting(self) -> None:
        """Go on with what has come: what is being read is read to its end. Nobody joins it from now on."""
        self.stopped = True
        self.until = 0.0
        if self.load is not None:
            self.load.stop_waiting()

    def follow_nobody(self) -> None:
        """Somebody who has waited long enough wants it: it is computed here unless it is there."""
        self.follows = False
        if self.load is not None:
            self.load.stop_waiting()

    async def get_place(self, places: asyncio.Semaphore) -> None:
        """Among those that are computed, unless it has one."""
        if self.places is None:
            await places.acquire()
            self.places = places

    def end_claim(self) -> None:
        """What was not saved by it is not to be computed here; its place goes to another one."""
        if self.claim is not None:
            self.claim.job.close()
            self.claim = None
        if self.places is not None:
            self.places.release()
            self.places = None

    async def ended(self) -> BroughtDocument:
        """What came of it. What was computed and moved is told to the first alone that asks."""
        assert self.task is not None
        brought = await asyncio.shield(self.task)
        told, self.told = self.told, True
        return replace(brought, computed=0, computing=None, moved=[]) if told else replace(brought)


class Errands:
    """The errands under way. `run` does one; it is cancelled when nobody wants it any more."""

    def __init__(self, run: Callable[[Errand], Coroutine[object, object, BroughtDocument]]) -> None:
        self._run = run
        self._under_way: dict[tuple[ChunkKey, bool], Errand] = {}
        self._tasks: set[asyncio.Task[BroughtDocument]] = set()

    @contextmanager
    def wanted(
        self, document: PlacedDocument, request: PrefillRequest | GenerateRequest, *, waits: bool
    ) -> Iterator[Errand]:
        """The errand for a document, begun if there is none of that kind."""
        name = (document.keys[-1], waits)
        errand = self._under_way.get(name)
        if errand is None or errand.stopped:
            errand = self._under_way[name] = Errand(document, request, waits)
            errand.task = asyncio.create_task(self._run(errand), name="engine-document")
            self._tasks.add(errand.task)
            errand.task.add_done_callback(self._tasks.discard)
            errand.task.add_done_callback(functools.partial(self._forget, name, errand))
        errand.wanted += 1
        try:
            yield errand
        finally:
            errand.wanted -= 1
            if not errand.wanted and errand.task is not None:
                self._forget(name, errand)
                errand.task.cancel()

    def found(self, document: PlacedDocument) -> None:
        """It is in blocks now: nobody needs to wait for another node's."""
        if errand := self._under_way.get((document.keys[-1], True)):
            errand.stop_waiting()

    async def aclose(self) -> None:
        """End all of them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, name: tuple[ChunkKey, bool], errand: Errand, _: object = None) -> None:
        if self._under_way.get(name) is errand:
            del self._under_way[name]
