"""Warm-up of prompts: a prefill leg into the store without a decode leg, when a prefiller has nothing else to do.

Owns how many are under way: one a prefiller. Such work counts as the node's load, so that requests are routed around
it; what was stored stays, however the warm-up ends.
"""

import asyncio
from collections.abc import Sequence

from kvcore.chunk_keys import split_adapter
from kvcore.clock import Clock
from kvcore.config.schema import RouterConfig
from kvcore.errors import DeadlineExceededError, InvalidRequestError, KVFerryError, NodeUnavailableError
from kvcore.types import Role
from nodeapi.documents import Documents
from nodeapi.messages import PrefillRequest, PrefillResult
from nodeapi.protocol import NodeClient
from router.documents.named import why_refused
from router.nodes.cluster import Cluster, KnownNode
from router.requests.spec import RequestSpec
from router.routing.views import serves
from router.upkeep.limits import UpkeepLimits
from router.upkeep.reports import PromptWarmed, WarmReply


class PromptWarmer:
    """One a router. Cancelling `warm` ends the leg under way."""

    def __init__(
        self, config: RouterConfig, cluster: Cluster, client: NodeClient, clock: Clock, limits: UpkeepLimits
    ) -> None:
        self._config, self._cluster, self._client = config, cluster, client
        self._clock, self._limits = clock, limits
        self._warming: set[str] = set()

    async def warm(self, specs: Sequence[RequestSpec]) -> WarmReply:
        """One prompt after the other. Raises as a prefill leg does, and NodeUnavailableError without a prefiller."""
        return WarmReply(prompts=[await self._warm(spec) for spec in specs])

    async def _warm(self, spec: RequestSpec) -> PromptWarmed:
        end = self._clock.now() + self._config.request_timeout_s
        node = await self._idle_prefiller(end, split_adapter(spec.cache_salt)[0])
        self._warming.add(node.id)
        try:
            began = self._clock.now()
            result = await self._prefill(node, spec, end - began)
            assert node.report is not None and node.report.engine is not None, "it was chosen as it has an engine"
            return PromptWarmed(
                tokens=len(spec.prompt_token_ids),
                cached_tokens=result.cached_tokens,
                computed_tokens=result.computed_tokens,
                stored_tokens=result.stored_chunks * node.report.engine.kv_spec.chunk_tokens,
                node=node.id,
                seconds=self._clock.now() - began,
                no_room=result.no_room,
            )
        finally:
            self._warming.discard(node.id)

    async def _idle_prefiller(self, end: float, adapter: str) -> KnownNode:
        while True:
            view = self._cluster.view()
            if not view.prefillers:
                away = "; ".join(f"{one.node}: {one.reason}" for one in view.unusable if one.role is Role.PREFILLER)
                why = f"none is usable ({away})" if away else "this cluster has none"
                raise NodeUnavailableError(f"warming needs a prefiller, and {why}")
            serve = [one for one in view.prefillers if serves(one, adapter)]
            if not serve:
                raise NodeUnavailableError(
                    "warming needs a prefiller that serves the adapter, and none that is up does"
                )
            idle = [one for one in serve if not one.prefill_tokens and one.id not in self._warming]
            if idle:
                return self._cluster.nodes[min(idle, key=lambda one: one.sequences).id]
            if self._clock.now() >= end:
                raise DeadlineExceededError("no prefiller had time for a warm-up")
            await asyncio.sleep(self._limits.warm_poll_s)

    def _documents(self, node: KnownNode, spec: RequestSpec) -> Documents | None:
        """What the node is told of the prompt's documents; None: it names none. Raises InvalidRequestError where they
        would be computed as all other text: nothing that is found again elsewhere would come of it."""
        if spec.documents is None:
            return None
        engine = node.report.engine if node.report is not None else None
        if why := spec.documents.why or why_refused(engine):
            raise InvalidRequestError(f"documents are not warmed: {why}", param="documents")
        return spec.documents.told

    async def _prefill(self, node: KnownNode, spec: RequestSpec, timeout_s: float) -> PrefillResult:
        documents = self._documents(node, spec)
        chosen = self._cluster.work_chosen(node.id, sequences=0, prefill_tokens=len(spec.prompt_token_ids))
        work = self._cluster.leg_started(chosen, sequences=0)
        request = PrefillRequest(
            request_id=spec.request_id,
            prompt_token_ids=spec.prompt_token_ids,
            cache_salt=spec.cache_salt,
            documents=documents,
            deadline_s=timeout_s,
        )
        try:
            result = await self._client.prefill(node.url, request, timeout_s=timeout_s)
        except KVFerryError as error:
            self._cluster.leg_ended(work, error=error)
            raise
        except BaseException:
            self._cluster.leg_ended(work)
            raise
        self._cluster.leg_ended(work, ok=True)
        return result
