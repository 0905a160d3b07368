"""The legs of one request as coroutines: each asks its node, and tells the request what came of it.

Owns the calls of a leg, its record and what it does to its node's load and breaker. Decides nothing about the request.
"""

import asyncio
import math
from collections.abc import Coroutine

import msgspec

from kvcore.chunk_keys import usable_chunks
from kvcore.errors import DeadlineExceededError, EngineError, KVFerryError, NodeUnavailableError
from kvcore.types import Route
from nodeapi.documents import Documents
from nodeapi.messages import EngineInfo, GenerateRequest, Handoff, LegInfo, PrefillResult
from router.documents.legs import LegDocuments, ToldDocuments
from router.documents.named import why_refused
from router.nodes.cluster import KnownNode, NodeWork
from router.nodes.stall_watch import WatchedLeg
from router.nodes.vllm_requests import mooncake_decode_params
from router.requests.events import (
    DecodeFailed,
    KVSource,
    PrefillDone,
    PrefillFailed,
    StartDecode,
    StartPrefill,
)
from router.requests.flow.decode_reading import DecodeReading, LegListener
from router.requests.flow.outputs import Outputs
from router.requests.leg_requests import generate_request, prefill_request
from router.requests.records import LegRecord
from router.requests.services import RequestServices
from router.requests.spec import RequestSpec

_NOTHING_TOLD = ToldDocuments()


class _Leg(msgspec.Struct, eq=False):
    """One that is under way. `watched`: None: its node is not known any more."""

    record: LegRecord
    work: NodeWork
    watched: WatchedLeg | None = None


class RequestLegs:
    """Runs the legs of one request. `records`: where each leg's record is added as it begins. `outputs`: while they are
    full no more is read from nodes.

    What a request asks of a node counts as the node's load from the moment the node is chosen: that of the route from
    here on, that of another node from `start` on, which follows the choice at once. It ends with its leg, or by
    `drop_chosen`.
    """

    def __init__(
        self,
        services: RequestServices,
        spec: RequestSpec,
        listener: LegListener,
        records: list[LegRecord],
        outputs: Outputs,
        *,
        started_at: float,
        route: Route,
        worth_waiting_s: float | None = None,
        before_handoff_s: float | None = None,
    ) -> None:
        """`worth_waiting_s`, `before_handoff_s`: see Decision. None: not known."""
        self._services = services
        self.spec = spec
        self._listener = listener
        self._records = records
        self._outputs = outputs
        self._started_at = started_at
        self._documents: LegDocuments | None = None
        """Of a prompt that names some."""
        if spec.documents is not None:
            self._documents = LegDocuments(spec.documents, lambda node: why_refused(self._engine(node)))
        self.approximate_tokens = 0
        """Of the prompt, the most that a decode leg reused approximately ..."""
        self.has_told = False
        """... as far as one has told."""
        self._worth_waiting_s = math.inf if worth_waiting_s is None else worth_waiting_s
        self._before_handoff = route.prefiller, before_handoff_s
        self._prefill_tokens = len(spec.prompt_token_ids) - route.expected_cached_tokens
        """What a prefill leg is expected to compute: it counts as load of its node."""
        self._promoted_tokens = route.expected_promoted_tokens
        self._chosen: dict[str, tuple[str, NodeWork]] = {}
        """By kind of leg: (node, what no leg has taken yet)."""
        self._legs: dict[str, _Leg] = {}
        """Those under way, by id."""
        self._choose("decode", route.decoder, spec.sampling.n)
        if route.prefiller is not None:
            self._choose("prefill", route.prefiller, 0)
        else:
            services.cluster.add_prefill(self._chosen["decode"][1], self._prefill_tokens)
            services.cluster.chosen(route.decoder, spec.prompt_token_ids, spec.cache_salt)

    def start(self, action: StartPrefill | StartDecode) -> Coroutine[object, object, None]:
        """The leg's body, to be run as a task. `let_go` when that has ended."""
        if isinstance(action, StartPrefill):
            leg, told = self._begin("prefill", action, 0), _NOTHING_TOLD
            if self._documents is not None:
                told = self._documents.of_prefill(action.node, action.decoder)
            leg.record.documents_computed = told.why
            self._watch(leg, self._prefill_tokens + self._promoted_tokens, is_prefill=True)
            return self._prefill(action, leg, told.documents)
        again = any(record.kind == "decode" for record in self._records)
        leg, told = self._begin("decode", action, self.spec.sampling.n if action.index is None else 1), _NOTHING_TOLD
        leg.record.in_need = self._services.cluster.stands_in(action.node)
        if self._documents is not None:
            told = self._documents.of_decode(action.node, waits=action.handoff)
        leg.record.documents_computed = told.why
        computes = self._prefill_tokens + self._promoted_tokens  # a tier may be late
        if action.handoff or action.source is not None:
            computes = 0
            if self._documents is not None:
                computes = self._documents.computed_by_decoder(len(self.spec.prompt_token_ids))
        elif again:
            computes = len(self.spec.prompt_token_ids) + len(action.output_token_ids)
        self._watch(leg, computes, is_prefill=False)
        return self._decode(action, leg, told.documents)

    @property
    def may_be_approximate(self) -> bool:
        """Whether some of the prompt is, or no decode leg has said yet."""
        asks = self.spec.documents is not None and self.spec.documents.told is not None
        return self.approximate_tokens > 0 or (asks and not self.has_told)

    def computes_itself(self, leg: str) -> None:
        """Nobody hands this decode leg over what it waited for: its first token has the time that this takes."""
        found = self._legs.get(leg)
        if found is not None and found.watched is not None:
            found.watched.computes = self._prefill_tokens + self._promoted_tokens

    def let_go(self, leg: str) -> None:
        """This leg's task has ended, perhaps before its first step."""
        work = self._legs.pop(leg).work
        if work.begun:
            self._services.cluster.leg_ended(work)
        self._services.cluster.stalls.end(leg)

    def drop_chosen(self) -> None:
        """No leg begins any more."""
        for kind in list(self._chosen):
            self._drop(kind)

    def _choose(self, kind: str, node: str, sequences: int) -> NodeWork:
        tokens = 0 if sequences else self._prefill_tokens
        work = self._services.cluster.work_chosen(node, sequences=sequences, prefill_tokens=tokens)
        if kind == "prefill":
            self._services.cluster.chosen(node, self.spec.prompt_token_ids, self.spec.cache_salt)
        self._chosen[kind] = node, work
        return work

    def _begin(self, kind: str, action: StartPrefill | StartDecode, sequences: int) -> _Leg:
        node, work = self._chosen.get(kind, (None, None))
        if work is None or node != action.node or work.sequences < sequences:
            self._drop(kind)
            work = self._choose(kind, action.node, sequences)
        record = LegRecord(id=action.leg, node=action.node, kind=kind)
        self._records.append(record)
        self._legs[action.leg] = leg = _Leg(record, self._services.cluster.leg_started(work, sequences=sequences))
        if not work.sequences:
            del self._chosen[kind]
        return leg

    def _watch(self, leg: _Leg, computes: int, *, is_prefill: bool) -> None:
        """Have it said if it is silent for too long; not of a node that is not known any more, which refuses it."""
        if (node := leg.work.node) is None:
            return
        listener, record = self._listener, leg.record
        leg.watched = WatchedLeg(
            record.id,
            node,
            self._services.clock.now(),
            computes,
            patience=2.0 ** listener.machine.stalls(record.kind),
            waits=lambda: listener.machine.prefill.is_awaited_by(record.id),
            move=lambda error: listener.stalled(record, error),
            is_prefill=is_prefill,
        )
        self._services.cluster.stalls.begin(leg.watched)

    def _drop(self, kind: str) -> None:
        if kind in self._chosen:
            self._services.cluster.leg_ended(self._chosen.pop(kind)[1])

    async def _prefill(self, action: StartPrefill, leg: _Leg, told: Documents | None) -> None:
        """From its start to PrefillDone or PrefillFailed. Cancelled: nothing is told."""
        services, spec = self._services, self.spec
        timeout_s = min(services.config.prefill_timeout_s, self._remaining_s())
        decoder = services.cluster.nodes.get(action.decoder)
        request = prefill_request(spec, action, decoder.segment_id if decoder else None, timeout_s, told)
        ok, failure = False, None
        try:
            result = await services.client.prefill(self.url(action.node), request, timeout_s=timeout_s)
            ok = True
        except KVFerryError as error:
            failure = error
        except asyncio.CancelledError:
            self._not_handed_over(leg, decoder)
            raise
        finally:
            services.cluster.leg_ended(leg.work, ok=ok, error=failure)
        if failure is not None:
            leg.record.error = f"{failure.code}: {failure.message}"
            self._listener.tell(PrefillFailed(action.leg, failure))
            return
        if leg.watched is not None:
            leg.watched.first(result.computed_tokens)
            leg.watched.ended_well()
        leg.record.told(result)
        leg.record.note = "no_room" if result.no_room else None
        self._prefilled(leg, result)
        if result.moved and leg.work.node is not None and decoder is not None:
            leg.work.node.rates.wrote(result.moved, decoder.machine, services.clock.now())
        self._listener.tell(PrefillDone(action.leg, result))

    def _not_handed_over(self, leg: _Leg, decoder: KnownNode | None) -> None:
        """This prefill leg was ended with its request, by no failure; decoders may have computed meanwhile."""
        (first, before_s), watched, record = self._before_handoff, leg.watched, leg.record
        if watched and decoder and record.error is None and before_s is not None and first == record.node:
            computed = max((one.computed_tokens or 0 for one in self._records if one.kind == "decode"), default=0)
            now, missed = self._services.clock.now(), min(computed, self._prefill_tokens)
            watched.node.was_late_for(decoder, missed, now - watched.started_at, before_s, now)

    async def _decode(self, action: StartDecode, leg: _Leg, told: Documents | None) -> None:
        """From its start to the last delta, or to DecodeFailed. Cancelled: nothing is told."""
        remaining_s = self._remaining_s()
        request = self._generate_request(action, told, remaining_s)
        ok = False
        failure: KVFerryError | None = None
        try:
            ok = await self._read(action, request, leg)
            if not ok:
                failure = NodeUnavailableError(f"node {action.node} ended its stream without a finish reason")
        except KVFerryError as error:
            failure = error
        finally:
            in_vain = isinstance(failure, EngineError) and self._listener.machine.fetches_from(action.leg) is not None
            blame = None if in_vain else failure  # its prefiller may have wronged it, nobody here can tell
            self._services.cluster.leg_ended(leg.work, ok=ok, error=blame)
        if failure is not None:
            leg.record.error = f"{failure.code}: {failure.message}"
            self._listener.tell(DecodeFailed(action.leg, failure))
            return
        spec = self.spec
        self._services.cluster.chosen(action.node, spec.prompt_token_ids, spec.cache_salt)  # handed over by now
        self._services.cluster.computed(action.node, spec.keys)

    def _prefilled(self, leg: _Leg, done: PrefillResult | LegInfo) -> None:
        """What this leg computed of the prompt tells how fast its node is."""
        if (node := leg.work.node) is not None:
            now = self._services.clock.now()
            node.rates.prefilled(done.computed_tokens, done.timings.compute_s, now)
            if done.moved:
                node.rates.moved(done.moved, now)
            node.touch()
        if self._promoted_tokens and not (done.promoted or done.tier_choices):
            self._services.cluster.caches.not_promoted(self.spec.keys)

    def num_chunks(self, decoder: str, prefiller: str | None) -> int:
        """How many chunks this prefiller could hand to this decoder; 0 while nothing is known of it."""
        engine = self._engine(decoder)
        if engine is None or prefiller is None:
            return 0
        if self._documents is not None:
            chunks = self._documents.num_chunks(prefiller, decoder, engine.kv_spec.chunk_tokens)
            if chunks is not None:
                return chunks
        return self._prefix_chunks(decoder, None)

    def url(self, node_id: str) -> str:
        """Where the node is; an address that refuses every call if it is no longer known."""
        node = self._services.cluster.nodes.get(node_id)
        return node.url if node else "http://127.0.0.1:9"

    async def _read(self, action: StartDecode, request: GenerateRequest, leg: _Leg) -> bool:
        """Feed deltas until each index has its finish reason, or none is wanted. False: the stream ended before."""
        services, n = self._services, request.sampling.n
        reading = DecodeReading(
            leg.record,
            n,
            self._outputs,
            leg.watched,
            listener=self._listener,
            note=lambda info: self._note(leg, info),
            now=services.clock.now,
        )
        patience_s = 2 * services.config.prefill_timeout_s  # if the request's deadline is sooner, it cancels this leg
        url, gap_s = self.url(action.node), services.limits.stall_s
        try:
            await services.client.generate(url, request, reading, first_s=patience_s, gap_s=gap_s)
        except DeadlineExceededError as error:
            raise NodeUnavailableError(f"node {action.node} has gone silent: {error.message}") from error
        if not reading.done:
            return False
        if not reading.missing and reading.spoke_at is not None:
            if leg.watched is not None:
                leg.watched.ended_well()
            if (node := leg.work.node) is not None:
                now = services.clock.now()
                node.rates.decoded(reading.tokens, n, now - reading.spoke_at, now)
                node.touch()
        return True

    def _note(self, leg: _Leg, info: LegInfo) -> None:
        leg.record.told(info)
        self.has_told = True
        self.approximate_tokens = max(self.approximate_tokens, info.approximate_tokens)
        self._prefilled(leg, info)
        self._services.cluster.leg_spoke(leg.work)

    def _generate_request(self, action: StartDecode, told: Documents | None, remaining_s: float) -> GenerateRequest:
        handoff = None
        if action.handoff:
            wait_s = min(self._services.config.prefill_timeout_s, remaining_s, self._worth_waiting_s)
            chunks = self._prefix_chunks(action.node, told)
            handoff = Handoff(num_chunks=chunks, wait_s=wait_s)
        params = self._handoff_params(action.source)
        return generate_request(self.spec, action, handoff, remaining_s, handoff_params=params, documents=told)

    def _prefix_chunks(self, decoder: str, documents: Documents | None) -> int:
        """That this decoder waits for by its prompt's own keys. Documents have others, and are all waited for."""
        if (engine := self._engine(decoder)) is None:
            return 0
        size = engine.kv_spec.chunk_tokens
        whole = usable_chunks(len(self.spec.prompt_token_ids), size)
        return whole if documents is None else min(whole, documents.header // size)

    def _handoff_params(self, source: KVSource | None) -> bytes:
        """What nixl's prefill leg answered; mooncake's decode leg is told of the prefill leg that runs beside it. Empty
        if its prefiller is no longer known: the decoder computes then."""
        if source is None or source.params:
            return source.params if source else b""
        engine = self._engine(source.node)
        return mooncake_decode_params(engine.kv_peer, source.leg) if engine and engine.kv_peer else b""

    def _engine(self, node_id: str) -> EngineInfo | None:
        node = self._services.cluster.nodes.get(node_id)
        return node.report.engine if node and node.report else None

    def _remaining_s(self) -> float:
        spent_s = self._services.clock.now() - self._started_at
        return max(0.001, self._services.config.request_timeout_s - spent_s)
