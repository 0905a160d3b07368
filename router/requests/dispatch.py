"""Starts requests: admits them, has the policy route them, and tells running ones of nodes that are lost.

What becomes of one is `router.requests.run`'s. No thread and no clock but the injected one, so that a simulation runs
it in virtual time.
"""

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Protocol

from kvcore.chunk_keys import split_adapter
from kvcore.config.routing import DecoderPrefill
from kvcore.errors import KVFerryError, NodeUnavailableError, OverloadedError, StoppingError
from router.nodes.cluster import Cluster
from router.requests.run import RequestRun
from router.requests.services import RequestServices
from router.requests.spec import RequestSpec
from router.routing.costs import WayChoice
from router.routing.decision import Decision
from router.routing.policies import least_loaded
from router.routing.policy import RoutePolicy
from router.routing.views import RouteRequest

_log = logging.getLogger("router")


class _UnderWay:
    """What requests bring, from being opened to their end. `rows`: in one step of all of them, see `RequestSpec.rows`,
    and so with `scores`. `flows`: sequences, by whose they are."""

    def __init__(self) -> None:
        self.rows = self.scores = 0
        self.flows: dict[str, int] = {}

    def begins(self, run: RequestRun) -> None:
        """One more."""
        self.rows += run.rows
        self.scores += run.scores
        self.flows[run.flow] = self.flows.get(run.flow, 0) + run.sequences

    def ends(self, run: RequestRun) -> None:
        """One that has begun."""
        self.rows -= run.rows
        self.scores -= run.scores
        if (left := self.flows.pop(run.flow) - run.sequences) > 0:
            self.flows[run.flow] = left


class _Runs(set[RequestRun]):
    """Requests at one stage of their life. One that is discarded has ended; one that is removed is at the next stage
    from then on."""

    def __init__(self, under_way: _UnderWay) -> None:
        super().__init__()
        self._under_way = under_way

    def discard(self, run: object) -> None:
        """Whether it is in it or not."""
        if isinstance(run, RequestRun) and run in self:
            self.remove(run)
            self._under_way.ends(run)


class _ChooseRoute(Protocol):
    """What the policy chooses for one request among the nodes of now."""

    def __call__(
        self,
        *,
        exclude: frozenset[str],
        decoder: str | None = None,
        fingerprint: bytes = b"",
        full: frozenset[str] = frozenset(),
    ) -> Decision:
        """`decoder`: only another prefiller for it is wanted. The others: see RouteRequest."""
        ...


class RoutePicker:
    """The ledger's Picker: by the policy, for one request."""

    def __init__(self, choose: _ChooseRoute, cluster: Cluster) -> None:
        self._choose = choose
        self._cluster = cluster

    def prefiller(self, decoder: str, exclude: frozenset[str]) -> str | None:
        """See Picker."""
        route = self._choose(exclude=exclude, decoder=decoder).route
        return route.prefiller if route else None

    def decoder(self, exclude: frozenset[str], fingerprint: bytes, full: frozenset[str]) -> str | None:
        """See Picker."""
        route = self._choose(exclude=exclude, fingerprint=fingerprint, full=full).route
        return route.decoder if route else None

    def fingerprint(self, node: str) -> bytes:
        """See Picker."""
        known = self._cluster.nodes.get(node)
        return known.fingerprint if known is not None else b""


class Dispatcher:
    """Starts requests. One a router."""

    def __init__(self, services: RequestServices, policy: RoutePolicy) -> None:
        self._services = services
        self._policy = policy
        self._plain_policy = least_loaded.make()
        """Chooses where the other one raises."""
        self._turn = 0
        self.under_way = _UnderWay()
        self._opened, self.running = _Runs(self.under_way), _Runs(self.under_way)
        """Entered and not left: they are told of nodes that are lost."""
        self.stopping = False
        """No request is taken any more."""

    def __repr__(self) -> str:
        calls = len(self._services.control)
        return f"<Dispatcher {len(self.running)} running, {self._turn} opened, {calls} control calls>"

    def go_by(self, policy: RoutePolicy) -> None:
        """This one chooses from the next request on."""
        self._policy = policy

    def route(self, spec: RequestSpec) -> Decision:
        """What the policy chooses for a request among the nodes of now. Nothing is load of them yet."""
        self._turn += 1
        return self._choose(spec, self._turn)

    def open(self, spec: RequestSpec, decision: Decision | None = None, *, waited_s: float = 0.0) -> RequestRun:
        """Route a request, if there is no `decision` of just now yet. It is load of the chosen nodes from here on.
        `async with` the result starts its legs, iterating yields its outputs. One that is not entered must be dropped.
        `waited_s`: how long it has been here.

        Raises StoppingError once this router stops, OverloadedError at `max_requests`, `max_rows` or `max_scores`,
        NodeUnavailableError when no node can decode it.
        """
        services, in_flight = self._services, self._services.log.in_flight + len(self._opened)
        if in_flight >= services.config.max_requests * spec.max_share:
            raise OverloadedError(f"{in_flight} requests are under way; the router takes no more at a time")
        rows, most = self.under_way.rows + spec.rows, services.limits.max_rows
        if rows > most:
            raise OverloadedError(f"choices and logprobs of {rows} tokens a step, over {most}, would be under way")
        if asked := spec.scores:
            scores, most = self.under_way.scores + asked, services.limits.max_scores
            if scores > most:
                raise OverloadedError(f"logprobs of {scores} tokens of prompts, over {most}, would be under way")
        if self.stopping:
            raise StoppingError("this router is stopping; ask another one, or this one when it is back")
        decision = decision or self.route(spec)
        if decision.route is None:
            raise NodeUnavailableError(decision.why_no_decoder())
        self._count_way(decision.way)
        picker = RoutePicker(partial(self._choose, spec, self._turn), services.cluster)
        run = RequestRun(services, spec, decision, picker, opened=self._opened, running=self.running, waited_s=waited_s)
        self.under_way.begins(run)
        return run

    def _count_way(self, way: WayChoice) -> None:
        """What speaks against the other way is doubted a little more, or tried from now on."""
        if (blamed := way.blamed) is None:
            return
        node = self._services.cluster.nodes.get(blamed.node)
        if node is not None:
            tried_at = self._services.clock.now() if way.tries else None
            node.rates.spoke_against(blamed.kind, blamed.machine, tried_at=tried_at)
            node.touch()

    def sequences_by_flow(self) -> Counter[str]:
        """Of those under way."""
        return Counter(self.under_way.flows)

    def describe(self) -> list[str]:
        """One line a running request, for the dump of a process that is looked into."""
        now = self._services.clock.now()
        return [f"{now - run.started_at:.3f} s: {run!r} {run.machine!r}" for run in self.running]

    async def drain(self, drain_s: float) -> list[str]:
        """Take no more requests. Returns when those under way have ended, by themselves or, after `drain_s`, because
        they are cut: then with their ids."""
        self.stopping = True
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self.running or self._opened:  # noqa: ASYNC110 - once in a router's life
                    await asyncio.sleep(self._services.limits.retry_pause_s)
        cut = [run for run in self.running if run.record.state == "running"]
        for run in cut:
            run.cut(StoppingError(f"the router stopped, and this request had not ended {drain_s:g} s later"))
        return [run.record.id for run in cut]

    async def aclose(self) -> None:
        """Wait for control calls under way (each is bounded)."""
        await self._services.control.aclose(self._services.limits.control_timeout_s)

    def _choose(
        self,
        spec: RequestSpec,
        turn: int,
        *,
        exclude: frozenset[str] = frozenset(),
        decoder: str | None = None,
        fingerprint: bytes = b"",
        full: frozenset[str] = frozenset(),
    ) -> Decision:
        """What the policy chooses among the nodes of now. See ChooseRoute."""
        cluster = self._services.cluster
        view = cluster.view()
        prompt, whole_prompt = spec.prompt_token_ids, spec.sampling.prompt_logprobs is not None
        hits = {} if whole_prompt else cluster.hits(view, prompt, spec.cache_salt, spec.keys)
        told = spec.documents.told if spec.documents is not None else None
        request = RouteRequest(
            prompt_tokens=len(prompt),
            completion_tokens=spec.sampling.max_tokens,
            min_prefill_tokens=0 if decoder else self._services.config.min_prefill_tokens,
            turn=turn,
            hits=hits,
            documents={} if told is None else cluster.caches.document_hits(view, told, spec.keys_of_documents, hits),
            exclude=exclude,
            decoder=decoder,
            fingerprint=fingerprint,
            full=full,
            prompt_token_ids=prompt,
            session=spec.session,
            asks=spec.sampling.asks,
            adapter=split_adapter(spec.cache_salt)[0],
            whole_prompt=whole_prompt,
            weighs=self._services.config.decoder_prefill is DecoderPrefill.FASTER,
            now=self._services.clock.now(),
        )
        try:
            return self._policy.choose(request, view)
        except Exception:  # a policy's bug: who waits for a choice, a leg or a turn, would wait for good
            _log.exception("policy_failed")
            return self._plain_policy.choose(request, view)

    def _oldest_first(self) -> list[RequestRun]:
        """Those under way: who came first chooses first, and a simulation is the same each time."""
        return sorted(self.running, key=lambda run: (run.started_at, run.record.id))

    def node_silent(self, node: str, error: KVFerryError) -> None:
        """A node has not answered a probe: prefills on it are done by another one that is there. May be said again."""
        for run in self._oldest_first():
            run.move_prefill(node, error)

    def node_lost(self, node: str, error: KVFerryError) -> None:
        """A node is silent for good: legs that need it go on elsewhere. May be said again."""
        for run in self._oldest_first():
            run.give_up(node, error)
