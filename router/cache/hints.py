"""Keeps what clients ask to have kept: pins the chunks of their prompts for a time, within bounds.

Off unless `router.cache.hints` says otherwise. Owns what clients' pins take. Invariants: they take at most a share of
what pins may take, and those of one cache salt at most half of that; no pin is made shorter by one.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvcore.chunk_keys import owner_of, prompt_keys, rank_key
from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.errors import KVFerryError
from kvcore.types import ChunkKey, KVSpec
from metadata_server.cache_messages import CacheReply
from router.cache.limits import HintLimits
from router.nodes.cluster import Cluster
from router.requests.control import ControlCalls
from router.requests.hints import HintRecord
from router.requests.records import RequestLog, RequestRecord
from router.requests.spec import RequestSpec


class PinsChunks(Protocol):
    """The metadata server, as far as it pins (`MetadataClient`)."""

    async def pin(self, keys: Sequence[ChunkKey], ttl_s: float | None = None, *, extend: bool = False) -> CacheReply:
        """`extend`: what is pinned for longer stays so."""
        ...


class HintPins:
    """One a router. `store`: who pins; None: there is no store."""

    def __init__(
        self,
        cluster: Cluster,
        log: RequestLog,
        clock: Clock,
        config: ClusterConfig,
        control: ControlCalls,
        *,
        store: PinsChunks | None,
        limits: HintLimits = HintLimits(),
    ) -> None:
        self._cluster, self._clock, self._config, self._control = cluster, clock, config, control
        self._limits = limits
        self._store = store
        self.room = PinRoom(limits.share_of_one_salt)
        log.prompt_observers.append(self.ended)

    def __repr__(self) -> str:
        return f"<HintPins {self.room!r}>"

    def ended(self, record: RequestRecord, asked: RequestSpec, output: Sequence[int]) -> None:
        """A request has ended: do what it asks, and say so in its record."""
        lasting = [(hint.keep_s, told) for hint, told in zip(asked.hints, record.hints, strict=True) if hint.keep_s]
        if not lasting:
            return
        records = [told for _, told in lasting]
        if not self._config.router.cache.hints:
            _tell(records, False, "router.cache.hints is off: chunks stay as long as there is room")
        elif record.state != "ok":
            _tell(records, False, "the request was not answered")
        elif self._store is None or (spec := self._kv_spec(record)) is None:
            _tell(records, False, "there is no store")
        else:
            ttl_s = min(max(keep_s for keep_s, _ in lasting), self._config.router.cache.longest_pin_s)
            self._control.send(self._pin(self._store, spec, asked, ttl_s, records))

    async def _pin(
        self, store: PinsChunks, spec: KVSpec, asked: RequestSpec, ttl_s: float, records: list[HintRecord]
    ) -> None:
        keys = prompt_keys(spec.fingerprint, asked.cache_salt, asked.prompt_token_ids, spec.chunk_tokens)
        now = self._clock.now()
        taken = self.room.take(keys, owner_of(asked.cache_salt), now + ttl_s, now, most=self._most_chunks(spec))
        if not taken:
            _tell(records, False, "the prompt fills no chunk" if not keys else "clients' pins have their room already")
            return
        try:
            by_rank = [rank_key(key, rank) for key in taken for rank in range(spec.tp_size)]
            reply = await store.pin(by_rank, ttl_s, extend=True)
        except KVFerryError as error:
            _tell(records, False, f"the metadata server did not pin: {error.message}")
            return
        done = reply.done // spec.tp_size
        _tell(records, done > 0, f"{done} of {len(keys)} chunks are kept for {ttl_s:g} s")

    def _most_chunks(self, spec: KVSpec) -> int:
        reports = [node.report for node in self._cluster.nodes.values() if node.report is not None]
        segments = sum(segment.size_bytes for report in reports for segment in report.segments)
        share = self._config.store.pin_share * self._limits.share_of_pins
        return int(share * segments / (spec.chunk_bytes * spec.tp_size))

    def _kv_spec(self, record: RequestRecord) -> KVSpec | None:
        node = self._cluster.nodes.get(record.route.decoder) if record.route is not None else None
        return node.report.engine.kv_spec if node is not None and node.report and node.report.engine else None


def _tell(records: list[HintRecord], applied: bool, why: str) -> None:
    for record in records:
        record.applied, record.why = applied, why


@dataclass(slots=True)
class _PinnedChunk:
    until: float
    salt: bytes


class PinRoom:
    """Which chunks clients' pins hold, by the salt of who asked first. Pure."""

    def __init__(self, share_of_one_salt: float) -> None:
        self._share = share_of_one_salt
        self._held: dict[ChunkKey, _PinnedChunk] = {}
        self._by_salt: Counter[bytes] = Counter()
        self._ends: list[tuple[float, ChunkKey]] = []

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"<PinRoom {len(self)} chunks of {len(self._by_salt)} salts>"

    def take(self, keys: Sequence[ChunkKey], salt: bytes, until: float, now: float, *, most: int) -> Sequence[ChunkKey]:
        """How many leading keys may be pinned until then, of `most` in all. They count until that time."""
        self._expire(now)
        for taken, key in enumerate(keys):
            held = self._held.get(key)
            if held is None:
                if len(self) >= most or self._by_salt[salt] >= self._share * most:
                    return keys[:taken]
                self._held[key] = held = _PinnedChunk(until, salt)
                self._by_salt[salt] += 1
            elif held.until >= until:
                continue
            held.until = until
            heapq.heappush(self._ends, (until, key))
        return keys

    def _expire(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            until, key = heapq.heappop(self._ends)
            held = self._held.get(key)
            if held is not None and held.until <= until:
                del self._held[key]
                self._by_salt[held.salt] -= 1
                if not self._by_salt[held.salt]:
                    del self._by_salt[held.salt]
