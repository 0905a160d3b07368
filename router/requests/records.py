"""What became of each request: a ring of the last ones, for people, and totals. Also the one log line a request."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from kvcore.clock import Clock
from kvcore.telemetry import log_line, shown
from nodeapi.messages import LegInfo, Moved, PrefillResult, Promoted, TierChoice, Timings
from router.documents.named import NamedDocuments
from router.requests.hints import HintRecord
from router.requests.spec import RequestSpec
from router.routing.costs import Way
from router.routing.decision import Candidate, Decision
from router.routing.shortlist import MANY
from router.routing.views import LeftOut

RING = 1000
_log = logging.getLogger("router.request")


class LegRecord(msgspec.Struct, kw_only=True):
    """One leg. `error`: code and message of its failure. `note`: why it did less than it was asked. `in_need`: decoded
    by a prefiller, as no decoder could."""

    id: str
    node: str
    kind: str
    cached_tokens: int | None = None
    approximate_tokens: int | None = None
    """See `nodeapi.messages.LegInfo`; so with `prepared_tokens`. None: there are none."""
    computed_tokens: int | None = None
    prepared_tokens: int | None = None
    documents_computed: str | None = None
    """Why it was told of no documents, which it computed as other text. None: it was, or there are none."""
    moved: list[Moved] = []
    promoted: list[Promoted] = []
    tier_choices: list[TierChoice] = []
    timings: Timings | None = None
    error: str | None = None
    note: str | None = None
    in_need: bool = False

    def told(self, done: PrefillResult | LegInfo) -> None:
        """What its node says of it."""
        self.cached_tokens, self.computed_tokens = done.cached_tokens, done.computed_tokens
        self.moved, self.promoted, self.timings = done.moved, done.promoted, done.timings
        self.tier_choices = done.tier_choices
        if isinstance(done, LegInfo):
            self.approximate_tokens = done.approximate_tokens or None
            self.prepared_tokens = done.prepared_tokens or None


class RouteRecord(msgspec.Struct, kw_only=True):
    """Where it went and why: the choice at its start. `expected_s`: from the choice to the first token; None: unknown.

    The explanation: `candidates`, of each role the best first, at most `decision.MAX_EXPLAINED`; so with `left_out`.
    `ways`: what was compared, the chosen one first."""

    prefiller: str | None
    decoder: str
    reason: str
    candidates: list[Candidate] = []
    left_out: list[LeftOut] = []
    ways: list[Way] = []
    expected_s: float | None = None

    def explain(self, decision: Decision) -> None:
        """By the decision that it is of."""
        self.candidates, self.left_out, self.ways = decision.candidates(), decision.left_out(), decision.best_ways()


def route_record(decision: Decision) -> RouteRecord:
    """Of a decision with a route, not explained yet."""
    route = decision.route
    assert route is not None
    return RouteRecord(
        prefiller=route.prefiller, decoder=route.decoder, reason=route.reason, expected_s=decision.expected_s
    )


class DocumentsRecord(msgspec.Struct, kw_only=True, frozen=True):
    """The documents of a prompt: how they were named, how many, and their tokens. `header_tokens`: they are computed
    behind so many. `why_computed`: as all other text is, for this reason; empty: nodes were to reuse them."""

    named_by: str
    count: int
    tokens: int
    header_tokens: int
    k: int
    why_computed: str = ""


def documents_record(named: NamedDocuments | None) -> DocumentsRecord | None:
    """None: the prompt names none."""
    if named is None:
        return None
    return DocumentsRecord(
        named_by=named.kind,
        count=len(named.spans),
        tokens=named.tokens,
        header_tokens=named.header,
        k=named.k,
        why_computed=named.why,
    )


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request; mutable while `state` is `running`, then `ok`, `failed` or `cancelled`."""

    id: str
    client_request_id: str | None = None
    answer_id: str | None = None
    """None: it is `id`."""
    tenant: str = ""
    """Whose it is; empty: no keys are configured."""
    adapter: str = ""
    """The name of the adapter that answers; empty: the model alone."""
    process: str | None = None
    """Which of the router's processes answers it; None: there is one."""
    began_at: float = 0.0
    """Unix time in seconds."""
    state: str = "running"
    prompt_tokens: int
    cached_tokens: int = 0
    """Reused, and what would have been computed."""
    approximate_tokens: int = 0
    """Reused of documents that were computed elsewhere: near to what would have been computed."""
    completion_tokens: int = 0
    documents: DocumentsRecord | None = None
    """None: the prompt names none."""
    waited_s: float = 0.0
    """In the router, for its turn (`router.admission`); part of `ttft_s` and `total_s`."""
    ttft_s: float | None = None
    total_s: float | None = None
    route: RouteRecord | None = None
    legs: list[LegRecord] = []
    hints: list[HintRecord] = []
    retries: int = 0
    retried_legs: list[tuple[str, str]] = []
    """(`prefill` or `decode`, code of the failure)."""
    error: str | None = None

    @property
    def in_need(self) -> bool:
        """Whether a prefiller decoded some of it."""
        for leg in self.legs:  # noqa: SIM110 - twice a request
            if leg.in_need:
                return True
        return False

    @property
    def way(self) -> str:
        """How it came to its first token: some of its prompt was brought from a `tier`, or else who computed what was
        not cached, its `prefiller` or its `decoder`."""
        if any(leg.promoted for leg in self.legs):
            return "tier"
        return "prefiller" if self.route is not None and self.route.prefiller is not None else "decoder"

    @property
    def forecast_error_s(self) -> float | None:
        """By how much the first token came later than was expected, below 0: sooner. None: nothing was, or a leg
        failed."""
        expected_s = self.route.expected_s if self.route is not None else None
        if expected_s is None or self.ttft_s is None or self.retries:
            return None
        return self.ttft_s - self.waited_s - expected_s

    def brief(self) -> "RequestRecord":
        """Without the explanation of its route: for lists of many."""
        if self.route is None:
            return self
        route = msgspec.structs.replace(self.route, candidates=[], left_out=[], ways=[])
        return msgspec.structs.replace(self, route=route)


def record_of(spec: RequestSpec, decision: Decision, waited_s: float = 0.0) -> RequestRecord:
    """As the request begins, of a decision with a route, which is not explained yet (`RequestLog.open`)."""
    return RequestRecord(
        id=spec.request_id,
        client_request_id=spec.client_request_id,
        answer_id=spec.answer_id,
        tenant=spec.tenant,
        adapter=spec.adapter,
        prompt_tokens=len(spec.prompt_token_ids),
        documents=documents_record(spec.documents),
        waited_s=waited_s,
        route=route_record(decision),
        hints=[HintRecord(name=hint.name, asked=hint.asked, why=hint.note) for hint in spec.hints],
    )


class RequestLog:
    """The ring and the totals. In-flight requests are in it too.

    Of a thousand records one is looked at: the choice of a request's nodes is explained when its record is asked for,
    and until then kept as it was made. One that would hold on to many nodes is explained at once."""

    def __init__(self, clock: Clock | None = None, process: str | None = None) -> None:
        """`clock`: by which requests begin; None: nobody asks when. `process`: as in records."""
        self._clock, self._process = clock, process
        self._ring: OrderedDict[str, RequestRecord] = OrderedDict()
        self._unexplained: dict[str, Decision] = {}
        """By id, of those in the ring."""
        self.observers: list[Callable[[RequestRecord], None]] = []
        """Called with each record when it is closed."""
        self.prompt_observers: list[Callable[[RequestRecord, RequestSpec, Sequence[int]], None]] = []
        """So too, with what was asked and the tokens of the first completion, which they must not keep."""
        self.in_flight = 0
        self.total = 0
        self.ok = 0
        self.failed = 0
        self.cancelled = 0
        self.retried = 0
        self.in_need = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    @property
    def hit_rate(self) -> float:
        """Cached share of the prompt tokens of answered requests."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def open(self, record: RequestRecord, decision: Decision) -> None:
        """A request begins, by this choice of its nodes."""
        self.in_flight += 1
        self.total += 1
        record.process = self._process
        record.began_at = 0.0 if self._clock is None else self._clock.wall()
        self._ring[record.id] = record
        if (kept := decision.to_explain(MANY)) is not None:
            self._unexplained[record.id] = kept
        elif record.route is not None:
            record.route.explain(decision)
        while len(self._ring) > RING:
            gone, _ = self._ring.popitem(last=False)
            self._unexplained.pop(gone, None)

    def close(self, record: RequestRecord, asked: RequestSpec, output: Sequence[int]) -> None:
        """It ended, with its final state set. Logs it. `output`: the tokens of its first completion."""
        self.in_flight -= 1
        self.retried += bool(record.retries)
        self.in_need += record.in_need
        if record.state == "ok":
            self.ok += 1
            self.prompt_tokens += record.prompt_tokens
            self.cached_tokens += record.cached_tokens
        elif record.state == "cancelled":
            self.cancelled += 1
        else:
            self.failed += 1
        log_line(_log, logging.WARNING if record.state == "failed" else logging.INFO, partial(_line, record))
        for observe in self.observers:
            observe(record)
        for observe_prompt in self.prompt_observers:
            observe_prompt(record, asked, output)

    def newest(self, shown: Callable[[str], bool] = lambda _tenant: True) -> list[RequestRecord]:
        """All in the ring, newest first, of the tenants that are `shown`."""
        return [self._explained(record) for record in reversed(self._ring.values()) if shown(record.tenant)]

    def briefs(self, shown: Callable[[str], bool] = lambda _tenant: True) -> list[RequestRecord]:
        """As `newest`, without the explanations of their routes."""
        return [record.brief() for record in reversed(self._ring.values()) if shown(record.tenant)]

    def named(self, name: str) -> list[RequestRecord]:
        """All in the ring, newest first, of which this is the id, the answer's, or the client's own X-Request-Id."""
        found = [one for one in reversed(self._ring.values()) if name in (one.id, one.client_request_id, one.answer_id)]
        return [self._explained(record) for record in found]

    def find(self, request_id: str, shown: Callable[[str], bool] = lambda _tenant: True) -> RequestRecord | None:
        """By the id of the answer, or by the client's own X-Request-Id (the newest with it)."""
        record = self._ring.get(request_id)
        if record is not None and shown(record.tenant):
            return self._explained(record)
        return next((one for one in self.named(request_id) if shown(one.tenant)), None)

    def _explained(self, record: RequestRecord) -> RequestRecord:
        if (decision := self._unexplained.pop(record.id, None)) is not None and record.route is not None:
            record.route.explain(decision)
        return record


def _line(record: RequestRecord) -> str:
    """What the log says of it, written as `log_fields` writes, of which it has too many fields for one call a
    request."""
    said = [f"request id={shown(record.id)}"]
    if record.client_request_id is not None:
        said.append(f"client_id={shown(record.client_request_id)}")
    if record.tenant:
        said.append(f"tenant={shown(record.tenant)}")
    if record.adapter:
        said.append(f"adapter={shown(record.adapter)}")
    said.append(f"state={record.state} prompt_tokens={record.prompt_tokens} cached_tokens={record.cached_tokens}")
    if record.approximate_tokens:
        said.append(f"approximate_tokens={record.approximate_tokens}")
    said.append(f"completion_tokens={record.completion_tokens}")
    if record.waited_s:
        said.append(f"waited_s={record.waited_s:.6g}")
    if record.ttft_s is not None:
        said.append(f"ttft_s={record.ttft_s:.6g}")
    if record.total_s is not None:
        said.append(f"total_s={record.total_s:.6g}")
    if (route := record.route) is not None:
        if route.prefiller is not None:
            said.append(f"prefiller={shown(route.prefiller)}")
        said.append(f"decoder={shown(route.decoder)} reason={shown(route.reason)}")
    if record.retries:
        said.append(f"retries={record.retries}")
    if record.in_need:
        said.append("in_need=True")
    if record.error is not None:
        said.append(f"error={shown(record.error)}")
    for leg in record.legs:
        if (spent := leg.timings) is not None:
            moved = sum([move.num_bytes for move in leg.moved]) if leg.moved else 0
            where = shown(
                f"node:{leg.node},queue:{spent.queue_s:.3f},wait:{spent.wait_s:.3f},load:{spent.load_s:.3f},"
                f"compute:{spent.compute_s:.3f},save:{spent.save_s:.3f},moved:{moved}"
            )
            said.append(f"{leg.kind}_{leg.id.rpartition('.')[2]}={where}")
    return " ".join(said)
