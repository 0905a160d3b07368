"""The scheduler half's way to the store's index: lookups run on a thread of their own, the scheduler never waits long.

Owns the thread, its loop and its metadata client. If the metadata server is away, the answer is that nothing is there.
"""

import asyncio
import logging
import threading
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.settings import ConnectorSettings
from kvcore.chunk_keys import rank_key
from kvcore.types import ChunkKey
from kvstore.wiring import open_placement

_logger = logging.getLogger(__name__)


class StoreLookup:
    """`Lookup` of `scheduler_half` over the metadata server. Called from one thread, vLLM's scheduler's."""

    def __init__(
        self, settings: ConnectorSettings, num_ranks: int, limits: ConnectorLimits = ConnectorLimits()
    ) -> None:
        self._settings = settings
        self._num_ranks = num_ranks
        self._limits = limits
        self._answers: dict[str, int | None] = {}
        self._asked: dict[str, int] = {}
        """Number of each request's latest lookup: an earlier one's answer is dropped."""
        self._lookups = 0
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvferry-lookup", daemon=True)
        self._thread.start()
        if not self._started.wait(limits.lookup_start_s):
            raise RuntimeError(f"the thread that looks chunks up did not start within {limits.lookup_start_s:g} s")

    def __repr__(self) -> str:
        with self._changed:
            pending = sum(answer is None for answer in self._answers.values())
            total = len(self._answers)
        return f"<StoreLookup of {self._num_ranks} ranks, {total} requests, {pending} without an answer>"

    def ask(self, request_id: str, keys: Sequence[ChunkKey]) -> None:
        """Start a lookup. The answer to an earlier one of this request is dropped."""
        with self._changed:
            self._answers[request_id] = None if keys else 0
            self._lookups += 1
            number = self._asked[request_id] = self._lookups
        if keys:
            self._submit(self._find(request_id, number, list(keys)))

    def answer(self, request_id: str, *, wait_s: float) -> int | None:
        """How many leading keys are complete on all ranks; None: not known within `wait_s`."""
        with self._changed:
            if wait_s > 0 and self._answers.get(request_id, 0) is None:
                self._changed.wait_for(lambda: self._answers.get(request_id, 0) is not None, wait_s)
            return self._answers.get(request_id, 0)

    def forget(self, request_id: str) -> None:
        """The request has ended: drop its answer."""
        with self._changed:
            self._answers.pop(request_id, None)
            self._asked.pop(request_id, None)

    def close(self) -> None:
        """End the thread, bounded. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(self._limits.lookup_close_s)

    def _submit(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        opened = AsyncExitStack()
        entering = opened.enter_async_context(open_placement(self._settings.store))
        self._placement = self._loop.run_until_complete(entering)
        self._started.set()
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(opened.aclose())
            self._loop.close()

    async def _find(self, request_id: str, number: int, keys: list[ChunkKey]) -> None:
        """One lookup. It has an answer in any case, 0 if it fails."""
        found = 0
        try:
            found = min(await asyncio.gather(*(self._match(keys, rank) for rank in range(self._num_ranks))))
        except Exception:
            _logger.exception("lookup_failed request=%s", request_id)
        finally:
            with self._changed:
                if self._asked.get(request_id) == number:
                    self._answers[request_id] = found
                    self._changed.notify_all()

    async def _match(self, keys: list[ChunkKey], rank: int) -> int:
        timeout_s = self._settings.store.metadata.timeout_s
        match = await self._placement.match([rank_key(key, rank) for key in keys], timeout_s, leased=False)
        return match.num_chunks  # what is loaded is leased, and verified
