"""Gets documents ready in the engine's blocks: found there, loaded from the store, or computed behind their header.

Nothing of a document is held for a request: what is ready can be found by its keys, as any chunk, until room is needed.
One that cannot be got ready is computed where it stands, with the rest of the prompt, so nothing here fails a request.
Each is got once for all requests that want it (`errands`), in two stages: what the request's other node computes is
waited for, as long as the request may wait; then what the store has is loaded, and what it lacks is computed. Room in
the store is the claim to compute it, as it is for a prefix: where another node was faster, that one is waited for.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence, Set

import msgspec

from engines.jobs.context import JobContext, as_moved
from engines.jobs.load import LoadJob
from engines.paged.arrivals import Arrivals
from engines.paged.arriving import ArrivingBlocks
from engines.paged.blocks import BlockManager
from engines.paged.errands import BroughtDocument, Errand, Errands
from engines.paged.leg import Leg
from engines.paged.legs import LegTable
from engines.paged.runner import ModelRunner, RowMove
from engines.paged.sequence import PlacedDocument, TokenSequence
from engines.paged.store_jobs import ChunkClaim, StoreJobs
from kvcore.chunk_keys import owner_of
from kvcore.clock import Clock
from kvcore.errors import CancelledByPeerError, DeadlineExceededError, KVFerryError, OverloadedError
from kvcore.types import ChunkKey
from kvstore.types import MovedBytes
from nodeapi.messages import GenerateRequest, PrefillRequest, PrefillResult

_log = logging.getLogger("engines")


class DocumentDesk:
    """`wake` is called whenever a request may go on."""

    def __init__(
        self,
        context: JobContext | None,
        *,
        runner: ModelRunner,
        blocks: BlockManager,
        arrivals: Arrivals,
        legs: LegTable,
        store_jobs: StoreJobs,
        clock: Clock,
        wake: Callable[[], None],
        most_computed: int,
    ) -> None:
        """`most_computed`: so many documents are computed at a time, that others' requests have room beside them."""
        self._computing = asyncio.Semaphore(most_computed)
        self._context = context
        self._runner = runner
        self._blocks = blocks
        self._arrivals = arrivals
        self._legs = legs
        self._store_jobs = store_jobs
        self._clock = clock
        self._wake = wake
        self._errands = Errands(self._run)
        self._prefills: dict[str, asyncio.Task[PrefillResult]] = {}

    async def prepare(self, leg: Leg, request: GenerateRequest) -> None:
        """Get a decode leg's documents ready, then let its sequence go on with those that are. What its prefix has in
        the cache, of documents too, is exact, and is taken instead."""
        sequence, began = leg.first, self._clock.now()
        try:
            wanted = await self._not_covered(sequence)
            getting = [self._bring(document, request, leg) for document in wanted]
            brought = await asyncio.gather(*getting)
            sequence.documents = tuple(one for one, came in zip(wanted, brought, strict=True) if came.ready)
            leg.prepared_tokens = sum(came.computed for came in brought)
            leg.moved_documents = [move for came in brought for move in came.moved]
            leg.documents_load_s = max((came.load_s for came in brought), default=0.0)
            for document in sequence.documents:
                if not document.exact:
                    sequence.limit_prefix(document.start)
        finally:
            leg.documents_s = self._clock.now() - began
            sequence.held = False
            self._wake()

    async def prefill(
        self, request: PrefillRequest, prefill: Callable[[PrefillRequest], Awaitable[PrefillResult]]
    ) -> PrefillResult:
        """Have each document of a request in the store, and the full chunks of their header by `prefill`. Raises
        InvalidRequestError, DeadlineExceededError, CancelledByPeerError when it is aborted."""
        documents = self._arrivals.place(request)
        self.abort(request.request_id)
        task = asyncio.create_task(self._prefill(request, documents, prefill), name="engine-documents")
        self._prefills[request.request_id] = task
        try:
            async with asyncio.timeout(request.deadline_s):
                return await task
        except TimeoutError as error:
            raise DeadlineExceededError(f"prefill {request.request_id} did not finish in time") from error
        except asyncio.CancelledError:
            asked = asyncio.current_task()
            if task.cancelled() and asked is not None and not asked.cancelling():
                raise CancelledByPeerError(f"prefill {request.request_id} was aborted") from None
            raise
        finally:
            if self._prefills.get(request.request_id) is task:
                del self._prefills[request.request_id]

    def abort(self, request_id: str) -> None:
        """End the prefill of documents under that id, if there is one."""
        if task := self._prefills.get(request_id):
            task.cancel()

    async def aclose(self) -> None:
        """End all that is under way."""
        tasks = list(self._prefills.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._errands.aclose()

    async def _prefill(
        self,
        request: PrefillRequest,
        documents: Sequence[PlacedDocument],
        prefill: Callable[[PrefillRequest], Awaitable[PrefillResult]],
    ) -> PrefillResult:
        assert request.documents is not None
        began = self._clock.now()
        prompt = request.prompt_token_ids[: request.documents.header + 1]  # its last full chunk is one to be reused
        alone = msgspec.structs.replace(request, prompt_token_ids=prompt, documents=None)
        storing = asyncio.gather(*(self._store(document, request) for document in documents))
        try:
            header, results = await asyncio.gather(prefill(alone), storing)
        except BaseException:
            storing.cancel()
            raise
        cached, computed, stored = header.cached_tokens, header.computed_tokens, header.stored_chunks
        moved: list[MovedBytes] = []
        computing = [brought.computing for brought, _ in results if brought.computing is not None]
        compute_s = max(end for _, end in computing) - min(start for start, _ in computing) if computing else 0.0
        total_s = self._clock.now() - began
        for document, (brought, complete) in zip(documents, results, strict=True):
            cached += 0 if brought.computed else document.stop - document.start
            computed += brought.computed
            stored += complete
            moved += brought.moved
        return msgspec.structs.replace(
            header,
            cached_tokens=cached,
            computed_tokens=computed,
            stored_chunks=stored,
            moved=[*header.moved, *as_moved(moved)],
            timings=msgspec.structs.replace(
                header.timings,
                load_s=max([header.timings.load_s, *(brought.load_s for brought, _ in results)]),
                compute_s=min(total_s, header.timings.compute_s + compute_s),
                total_s=total_s,
            ),
        )

    async def _store(self, document: PlacedDocument, request: PrefillRequest) -> tuple[BroughtDocument, int]:
        """What came of it, and how many of its chunks are complete in the store now."""
        if await self._stored(document.keys) == len(document.keys):
            return BroughtDocument(ready=True), len(document.keys)
        brought = await self._bring(document, request, None)
        save = brought.save
        if brought.ready and save is None:  # it was found here, and the store may have lost it
            save = self._save(document, self._claim_chunks(document, request))
        if save is None:
            return brought, 0
        complete = await asyncio.shield(save)
        return brought, sum(key in complete for key in document.keys)

    async def _stored(self, keys: Sequence[ChunkKey]) -> int:
        if self._context is None:
            return 0
        match = await self._context.store.match(keys, timeout_s=self._context.timeout_s, leased=False)
        return match.num_chunks

    async def _not_covered(self, sequence: TokenSequence) -> list[PlacedDocument]:
        keys = sequence.keys(sequence.num_reusable_chunks)
        there = next((at for at, key in enumerate(keys) if not self._blocks.holds(key)), len(keys))
        if there < len(keys):
            there += await self._stored(keys[there:])
        return [one for one in sequence.documents if one.stop > there * sequence.chunk_tokens]

    async def _bring(
        self, document: PlacedDocument, request: PrefillRequest | GenerateRequest, leg: Leg | None
    ) -> BroughtDocument:
        """Have it got, once for all that want it. `leg`: waits for another node's chunks before it, if that is due."""
        waited = BroughtDocument()
        if leg is not None and leg.handoff is not None:
            waited = await self._wait_for(document, request, leg, leg.arrived + leg.handoff.wait_s)
            if waited.ready:
                return waited
        with self._errands.wanted(document, request, waits=False) as errand:
            if leg is not None and leg.handoff is not None:
                errand.follow_nobody()
            brought = await errand.ended()
        brought.load_s += waited.load_s
        brought.moved = waited.moved + brought.moved
        return brought

    async def _wait_for(
        self, document: PlacedDocument, request: PrefillRequest | GenerateRequest, leg: Leg, until: float
    ) -> BroughtDocument:
        """Wait for its chunks together with the other legs that do, as long as this one may."""
        stopped = asyncio.get_running_loop().create_future()
        leg.stop_waiting.append(lambda: None if stopped.done() else stopped.set_result(None))
        with self._errands.wanted(document, request, waits=True) as errand:
            assert errand.task is not None
            errand.wait_until(until)
            left_s = max(0.0, until - self._clock.now())
            await asyncio.wait({errand.task, stopped}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            # 1. The wait is over for all.
            # 2. Others wait on: this leg alone waits no longer.
            # 3. It was the last one: what is being read now is read to its end.
            if not errand.task.done():
                if errand.wanted > 1:
                    return BroughtDocument()
                errand.stop_waiting()
            return await errand.ended()

    async def _run(self, errand: Errand) -> BroughtDocument:
        brought = BroughtDocument()
        try:
            await self._load(errand, brought)
            if errand.stored and not self._holds(errand.document):
                await self._load(errand, brought)
            if not errand.waits and not self._holds(errand.document):
                await errand.get_place(self._computing)
                await self._compute(errand, brought)
        except KVFerryError as error:
            _log.info("event=document_not_ready request=%s reason=%s", errand.request.request_id, error.message)
        except Exception:  # the boundary of a document: its request goes without it
            _log.exception("event=document_failed request=%s", errand.request.request_id)
        finally:
            errand.end_claim()
        brought.ready = self._holds(errand.document)
        if brought.ready and not errand.waits:
            self._errands.found(errand.document)
        return brought

    def _holds(self, document: PlacedDocument) -> bool:
        return all(self._blocks.holds(key) for key in document.keys)

    async def _load(self, errand: Errand, brought: BroughtDocument) -> None:
        keys = [key for key in errand.document.keys if not self._blocks.holds(key)]
        if self._context is None or not keys:
            return
        place = ArrivingBlocks(keys, self._blocks, self._runner.block_view)
        limits = self._context.limits
        errand.load = LoadJob(
            self._context,
            keys,
            place.into,
            wait_chunks=len(keys) if errand.waits else 0,
            deadline=errand.until,
            loaded=place.loaded,
            claim=None
            if errand.waits or errand.stored or not errand.follows
            else functools.partial(self._claim, errand),
            owner=owner_of(errand.request.cache_salt),
            follow_s=min(limits.follow_s * len(keys), limits.follow_document_s),
        )
        try:
            await errand.load.run()
        finally:
            place.loaded(errand.load.num_loaded)
            place.close()
            brought.moved += errand.load.moved
            brought.load_s += errand.load.load_s
            self._wake()

    async def _claim(self, errand: Errand, given_up: Set[str]) -> Sequence[str]:
        """See `engines.jobs.load.Claim`. Who has it computes at once: its place is waited for before."""
        assert self._context is not None
        await errand.get_place(self._computing)
        keys = errand.document.keys
        errand.claim = claim = self._claim_chunks(errand.document, errand.request)
        assert claim is not None
        await claim.job.begun.wait()
        writers = claim.job.writers(next((key for key in keys if not self._blocks.holds(key)), keys[-1]))
        errand.stored = claim.job.stored.issuperset(keys)
        if errand.stored or set(writers) - given_up - {self._context.store.node_id}:
            errand.end_claim()
            await asyncio.wait({claim.task})
        return writers

    async def _compute(self, errand: Errand, brought: BroughtDocument) -> None:
        document, request = errand.document, errand.request
        prompt, at = request.prompt_token_ids, document.computed_at
        leg = self._arrivals.document_leg(
            f"{request.request_id}/document-{document.start}",
            prompt[:at],
            prompt[document.start : document.stop],
            request.cache_salt,
        )
        self._legs.open(leg, request.deadline_s)
        try:
            await leg.done
            brought.computed = leg.first.num_prompt_computed
            if leg.started is not None and leg.computed is not None:
                brought.computing = leg.started, leg.computed
            brought.save = await self._keep(errand, leg.kept or [])
        finally:
            self._legs.close(leg)
            self._blocks.release(leg.kept or [])
            self._wake()

    async def _keep(self, errand: Errand, computed: Sequence[int]) -> "asyncio.Task[frozenset[ChunkKey]] | None":
        """Copy it out of the blocks that it was computed in into chunks of its own: these begin where it begins."""
        document = errand.document
        blocks, per_chunk, chunk_tokens = self._blocks, self._blocks.blocks_per_chunk, self._blocks.chunk_tokens
        if not blocks.can_allocate(per_chunk * len(document.keys)):
            raise OverloadedError("there are no blocks to keep a document in")
        taken = blocks.allocate(per_chunk * len(document.keys))
        chunks = [taken[start : start + per_chunk] for start in range(0, len(taken), per_chunk)]
        end = document.computed_at + document.stop - document.start
        moves = [
            RowMove(computed, at, at, chunk, 0, at, min(chunk_tokens, end - at))
            for at, chunk in zip(range(document.computed_at, end, chunk_tokens), chunks, strict=True)
        ]
        try:
            await self._runner.move(moves, chunks[-1])
            for key, chunk in zip(document.keys, chunks, strict=True):
                blocks.seal(key, chunk)
            return self._save(document, errand.claim or self._claim_chunks(document, errand.request))
        finally:
            blocks.release(taken)

    def _claim_chunks(self, document: PlacedDocument, request: PrefillRequest | GenerateRequest) -> ChunkClaim | None:
        prefer = request.prefer_segment if isinstance(request, PrefillRequest) else None
        return self._store_jobs.claim_chunks(document.keys, owner_of(request.cache_salt), prefer)

    def _save(self, document: PlacedDocument, claim: ChunkClaim | None) -> "asyncio.Task[frozenset[ChunkKey]] | None":
        """Save its chunks, which are in blocks."""
        chunk_tokens, size = self._blocks.chunk_tokens, document.stop - document.start
        chunks: list[tuple[ChunkKey, int, tuple[int, ...]]] = []
        for first, key in zip(range(0, size, chunk_tokens), document.keys, strict=True):
            found = self._blocks.reuse_chunk(key)
            if found is not None:
                chunks.append((key, min(chunk_tokens, size - first), found))
        return self._store_jobs.save_chunks(chunks, claim)
