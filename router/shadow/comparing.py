"""Requests that have ended are computed in full too, and compared, while their node has nothing else to do.

Owns the queue of those that wait, and the one comparison under way. A client waits for none of it: a node is asked
while it is idle, its engine refuses while it is not, and what comes meanwhile goes first there. Prompts are kept while
they wait, and no longer.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kvcore.chunk_keys import prompt_keys
from kvcore.clock import Clock
from kvcore.errors import KVFerryError, OverloadedError
from kvcore.telemetry import log_fields
from kvcore.types import KVSpec
from nodeapi.documents import CompareReply, CompareRequest, Documents
from router.nodes.cluster import Cluster, KnownNode
from router.requests.records import LegRecord, RequestRecord
from router.requests.spec import RequestSpec
from router.shadow.gate import BlendGate
from router.shadow.judging import ReuseVerdict, at_most, sources, tolerance, verdict
from router.shadow.limits import ShadowLimits
from router.shadow.quarantine import DropChunks
from router.shadow.reports import BlendReport, DivergentChunk, ReuseDivergence

EXACT, DOCUMENTS = "exact", "documents"
_log = logging.getLogger("router")


class ComparingClient(Protocol):
    """The one call of `nodeapi.documents` to a node by its URL; `nodeapi.client` makes it."""

    async def compare(self, url: str, request: CompareRequest, *, timeout_s: float) -> CompareReply:
        """Have the node compute a prompt both ways. OverloadedError: it has other work."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Shadowed:
    """A request that waits to be compared on `node`. `again`: it was found to be wrong on another one.
    `tokens`: its prompt, and what of its answer is in KV."""

    request_id: str
    node: str
    tokens: list[int]
    salt: bytes
    legs: Sequence[LegRecord]
    until: float
    documents: Documents | None = None
    kind: str = ""
    """Of documents that are judged by it."""
    again: bool = False

    @property
    def what(self) -> str:
        """By what it is counted."""
        return EXACT if self.documents is None else DOCUMENTS


class ShadowComparisons:
    """One a router, for its one model. `draw`: a number in [0, 1), anew each time. `shares`: of requests answered from
    the cache exactly, and with documents."""

    def __init__(
        self,
        cluster: Cluster,
        client: ComparingClient,
        clock: Clock,
        gate: BlendGate,
        drop: DropChunks,
        *,
        model: str,
        shares: tuple[float, float],
        draw: Callable[[], float],
        limits: ShadowLimits = ShadowLimits(),
    ) -> None:
        self._cluster, self._client, self._clock = cluster, client, clock
        self._gate, self._drop, self._limits = gate, drop, limits
        self._model = model
        self._exact_share, self._documents_share = shares
        self._draw = draw
        self._waiting: deque[Shadowed] = deque()
        self._tokens = 0
        self._came = asyncio.Event()
        self.counts: Counter[tuple[str, str]] = Counter()
        """(`exact` or `documents`, outcome): `same`, `diverged`, `compared`, `nothing_reused`, `dropped`, `failed`."""
        self.wrong_chunks = 0
        self.divergences: deque[ReuseDivergence] = deque(maxlen=limits.remembered)

    def __repr__(self) -> str:
        return f"<ShadowComparisons {len(self._waiting)} waiting, {sum(self.counts.values())} done>"

    def problem(self) -> str | None:
        """A sentence for people once reuse was found to be wrong; None: it never was."""
        if not self.divergences:
            return None
        found, last = self.counts[EXACT, "diverged"], self.divergences[0]
        return (
            f"{found} answers were made from KV in the cache that is not what their tokens give, the last of them "
            f"{last.request_id} on {last.node}: see `kvferry blend status`"
        )

    def report(self) -> BlendReport:
        """The gate's, and what was compared."""
        report = self._gate.report()
        report.exact_shadow = self._exact_share
        report.comparisons = {f"{what} {outcome}": number for (what, outcome), number in sorted(self.counts.items())}
        report.waiting, report.divergences = len(self._waiting), list(self.divergences)
        return report

    # --- what comes ---

    def ended(self, record: RequestRecord, asked: RequestSpec, output: Sequence[int]) -> None:
        """A request has ended: a share of them is to be compared. For `RequestLog.prompt_observers`. Chunks of its
        output are verified with those of its prompt: what was computed behind a wrong chunk is wrong, too."""
        if record.state != "ok" or record.route is None or asked.sampling.prompt_logprobs is not None:
            return
        told = asked.documents.told if asked.documents is not None else None
        if asked.documents is not None and told is not None:
            if record.approximate_tokens and self._is_drawn(self._documents_share):
                one = self._of(record, asked, asked.prompt_token_ids)
                self._add(replace(one, documents=told, kind=asked.documents.kind))
        elif record.cached_tokens and self._is_drawn(self._exact_share):
            self._add(self._of(record, asked, [*asked.prompt_token_ids, *output[:-1]]))

    def _is_drawn(self, share: float) -> bool:
        return share > 0 and self._draw() < share

    def _of(self, record: RequestRecord, asked: RequestSpec, tokens: list[int]) -> Shadowed:
        decoded = [leg.node for leg in record.legs if leg.kind == "decode" and leg.error is None]
        return Shadowed(
            request_id=record.id,
            node=decoded[0] if decoded else "",
            tokens=tokens,
            salt=asked.cache_salt,
            legs=record.legs,
            until=self._clock.now() + self._limits.patience_s,
        )

    def _add(self, one: Shadowed) -> None:
        self._waiting.append(one)
        self._tokens += len(one.tokens)
        while len(self._waiting) > self._limits.waiting or self._tokens > self._limits.waiting_tokens:
            self._end(self._waiting[0], "dropped")
        self._came.set()

    def _end(self, one: Shadowed, outcome: str) -> None:
        if one in self._waiting:  # it may have given way to a new one while it was compared
            self._waiting.remove(one)
            self._tokens -= len(one.tokens)
            self.counts[one.what, outcome] += 1

    # --- what is done ---

    async def run(self) -> None:
        """Compare one after the other, until cancelled."""
        while True:
            self._came.clear()
            if not self._waiting:
                await self._came.wait()
            for one in [one for one in self._waiting if one.until <= self._clock.now()]:
                self._end(one, "dropped")
            if (found := self._next()) is None or not await self._compare(*found):
                await asyncio.sleep(self._limits.poll_s)

    def _next(self) -> tuple[Shadowed, KnownNode, KVSpec] | None:
        """The first whose node has nothing to do."""
        for one in self._waiting:
            node = self._cluster.nodes.get(one.node)
            if node is not None and self._is_idle(node) and (spec := _kv_spec(node)) is not None:
                return one, node, spec
        return None

    def _is_idle(self, node: KnownNode) -> bool:
        stats = node.report.stats if node.report is not None else None
        busy = node.sequences or node.prefill_tokens or node.others_sequences
        return not busy and stats is not None and self._cluster.why_unused(node) is None

    async def _compare(self, one: Shadowed, node: KnownNode, spec: KVSpec) -> bool:
        """False: not now."""
        limits = self._limits
        request = CompareRequest(
            request_id=f"shadow-{one.request_id}",
            prompt_token_ids=one.tokens,
            cache_salt=one.salt,
            documents=one.documents,
            num_tokens=limits.tokens,
            max_distance=tolerance(spec).distance if one.documents is None else 0.0,
            deadline_s=limits.deadline_s,
        )
        try:
            reply = await self._client.compare(node.url, request, timeout_s=limits.deadline_s + limits.reply_s)
        except OverloadedError:
            return False
        except KVFerryError as error:
            log_fields(_log, logging.WARNING, "not_compared", id=one.request_id, node=node.id, error=error.message)
            self._end(one, "failed")
            return True
        if one.documents is not None:
            self._end(one, self._judge_documents(one, node, reply))
        else:
            said = verdict(reply, tolerance(spec))
            self._end(one, "diverged" if said.diverged else "same" if reply.cached_tokens else "nothing_reused")
            if said.diverged:
                await self._tell(one, node, spec, said, reply)
        return True

    def _judge_documents(self, one: Shadowed, node: KnownNode, reply: CompareReply) -> str:
        if not reply.approximate_tokens or not reply.kl:
            return "nothing_reused"
        if why := self._gate.compared(self._model, one.kind, reply.kl[0], reply.agreement):
            log_fields(_log, logging.ERROR, "blend_off", model=self._model, kind=one.kind, node=node.id, why=why)
        return "compared"

    async def _tell(
        self, one: Shadowed, node: KnownNode, spec: KVSpec, said: ReuseVerdict, reply: CompareReply
    ) -> None:
        """Name what is wrong, loudly, and have it dropped. What other engines have of it is looked for next."""
        keys = prompt_keys(spec.fingerprint, one.salt, one.tokens, spec.chunk_tokens)
        most = self._limits.most
        wrong = [number for number in said.wrong if number < len(keys)]  # a node may have begun anew, with other chunks
        chunks = [
            DivergentChunk(key=keys[number].hex(), number=number, distance=at_most(reply.distances[number], most))
            for number in wrong
        ]
        machines = dict[str, str]()
        for other in self._cluster.nodes.values():
            known = machines.get(other.machine)
            machines[other.machine] = other.id if known is None else f"{known}, {other.id}"
        divergence = ReuseDivergence(
            request_id=one.request_id,
            node=node.id,
            at=self._clock.wall(),
            gap=at_most(said.gap, most),
            chunks=chunks,
            sources=sources(one.legs, node.id, machines) or ["the engine's own blocks"],
        )
        self.wrong_chunks += len(chunks)
        self.divergences.appendleft(divergence)
        if chunks:
            gone = await self._drop(spec.fingerprint, [keys[number] for number in wrong])
            divergence.replicas, divergence.left = gone.nodes, gone.left
        log_fields(
            _log,
            logging.ERROR,
            "cache_divergence",
            id=one.request_id,
            node=node.id,
            chunks=",".join(f"{chunk.number}:{chunk.key}" for chunk in chunks) or "not told",
            distance=max((chunk.distance for chunk in chunks), default=None),
            gap=divergence.gap,
            sources="; ".join(divergence.sources),
            replicas=",".join(divergence.replicas) or None,
            left="; ".join(divergence.left) or None,
        )
        if not one.again:
            until = self._clock.now() + self._limits.patience_s
            for other in self._cluster.nodes.values():
                if other is not node and other.fingerprint == node.fingerprint:
                    self._add(replace(one, node=other.id, until=until, again=True))


def _kv_spec(node: KnownNode) -> KVSpec | None:
    return node.report.engine.kv_spec if node.report is not None and node.report.engine is not None else None
