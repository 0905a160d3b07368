"""Asks every node for its report, in rounds, and says which nodes are lost: silent for so long that legs must move.
One that is suspected of doing nothing is given a token to make: a report says little of an engine that hangs.

Owns the rounds. What a report means is the cluster's.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from kvcore.clock import Clock
from kvcore.config.schema import RouterConfig
from kvcore.errors import DeadlineExceededError, KVFerryError, NoDescriptorsError, NodeUnavailableError
from kvcore.telemetry import log_fields
from nodeapi.messages import GenerateRequest, TokenDelta
from nodeapi.protocol import NodeClient
from nodeapi.sampling import SamplingParams
from router.nodes.cluster import Cluster, KnownNode
from router.nodes.limits import NodeHealthLimits
from router.nodes.stall_watch import works

_log = logging.getLogger("router")
_ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


class _FirstToken:
    """A DeltaReader that wants no more than one."""

    def __init__(self) -> None:
        self.came = False

    def take(self, delta: TokenDelta) -> bool:
        self.came = bool(delta.token_ids)
        return not self.came

    async def ready(self) -> bool:
        return False


class Prober:
    """One a router."""

    def __init__(
        self,
        config: RouterConfig,
        cluster: Cluster,
        client: NodeClient,
        clock: Clock,
        limits: NodeHealthLimits = NodeHealthLimits(),
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._client = client
        self._clock = clock
        self._limits = limits
        self._could_not_ask = False
        self._numbers = count(1)
        self._trials = dict[str, asyncio.Task[None]]()
        """Of suspected nodes, by id: a node that is slow may take longer than a round."""
        self.on_lost: list[Callable[[str, KVFerryError], None]] = []
        """Called with a node's id and why its legs are lost, at each probe for as long as it stays silent."""
        self.on_silent: list[Callable[[str, KVFerryError], None]] = []
        """Called with a node's id and why, at each probe that it has not answered before it is lost."""
        self.on_round: list[Callable[[], None]] = []
        """Called when every node has been asked."""

    def go_by(self, config: RouterConfig) -> None:
        """These times hold from the next round on."""
        self._config = config

    async def run(self) -> None:
        """Probe every node each `probe_interval_s`, or as often as `probes_per_s` allows, and at once when the cluster
        asks for it. Runs until cancelled."""
        asked = self._cluster.probe_asked
        try:
            while True:
                number = len(self._cluster.nodes)
                interval_s = max(self._config.probe_interval_s, number / self._limits.probes_per_s)
                spread_s = interval_s * self._limits.spread_share if number > self._limits.probes_at_once else 0.0
                await self.probe(spread_s=spread_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(interval_s - spread_s):
                        await asked.wait()
                asked.clear()
        finally:
            trials = list(self._trials.values())
            for trial in trials:
                trial.cancel()
            await asyncio.gather(*trials, return_exceptions=True)

    async def probe(self, *, spread_s: float = 0.0) -> None:
        """Ask the nodes for their report; each answer is bounded by the connect timeout. Many nodes are asked over
        `spread_s` in batches, as asking all of them in one step would hold up everything else; those that are not used
        first. Of nodes of which nothing but an event is known as many as there is time for, those first that were not
        asked for longest."""
        timeout_s, nodes = self._config.connect_timeout_s, list(self._cluster.nodes.values())
        strangers = sorted((node for node in nodes if node.is_stranger), key=lambda node: node.asked_at, reverse=True)
        ends = self._clock.now() + timeout_s
        others = sorted((node for node in nodes if not node.is_stranger), key=lambda node: node.problem is None)
        workers = min(len(strangers), self._limits.strangers_at_once)
        at_once = self._limits.probes_at_once
        batches = [others[first : first + at_once] for first in range(0, len(others), at_once)]
        pause_s = max(self._limits.batch_pause_s, spread_s / max(1, len(batches)))
        begun = [self._probe_batch(batch, timeout_s, number * pause_s) for number, batch in enumerate(batches)]
        tried = self._try_suspected(nodes, timeout_s)
        await asyncio.gather(*begun, tried, *(self._probe_strangers(strangers, ends) for _ in range(workers)))
        for tell in self.on_round:
            tell()

    async def _probe_batch(self, nodes: list[KnownNode], timeout_s: float, after_s: float) -> None:
        if after_s:
            await asyncio.sleep(after_s)
        await asyncio.gather(*(self._probe(node, timeout_s) for node in nodes))

    async def _probe_strangers(self, waiting: list[KnownNode], ends: float) -> None:
        """One after the other, the last one first, as long as half of the time of a probe is left."""
        while waiting and (left_s := ends - self._clock.now()) >= self._config.connect_timeout_s / 2:
            await self._probe(waiting.pop(), left_s)

    async def _probe(self, node: KnownNode, timeout_s: float) -> None:
        asked_at = node.asked_at = self._clock.now()
        before = node.problem
        try:
            report = await self._client.info(node.url, timeout_s=timeout_s)
        except NoDescriptorsError as error:
            self._not_asked(node, error)
        except KVFerryError as error:
            late = isinstance(error, DeadlineExceededError)
            node.misses += late
            if not late or node.misses >= self._limits.misses_to_lose or node.problem is not None:
                node.problem = error.message
            if isinstance(error, NodeUnavailableError | DeadlineExceededError):
                self._unanswered(node, asked_at)
        else:
            self._could_not_ask = False
            self._cluster.reported(node, report)
        self._cluster.probed(node, before)

    async def _try_suspected(self, nodes: list[KnownNode], timeout_s: float) -> None:
        """One trial a node at a time; the round waits for it no longer than for a report."""
        for node in nodes:
            if node.trust.suspected and node.id not in self._trials:
                self._trials[node.id] = asyncio.get_running_loop().create_task(self._try(node))
        if self._trials:
            await asyncio.wait(self._trials.values(), timeout=timeout_s)

    async def _try(self, node: KnownNode) -> None:
        """It has as long as a request's first token there: one that others keep busy answers no sooner, and would stay
        suspected for ever."""
        first_s = node.pace.first_limit_s(self._config.stall_first_s, 1)
        try:
            await self.trial(node, max(self._config.connect_timeout_s, first_s))
        finally:
            del self._trials[node.id]

    async def trial(self, node: KnownNode, timeout_s: float) -> str:
        """Have it make a token. Why it has not; empty: it has, so it works, whatever made it suspected."""
        name = f"trial-{node.id}-{next(self._numbers)}"
        asked = GenerateRequest(request_id=name, prompt_token_ids=[1], sampling=_ONE_TOKEN, deadline_s=timeout_s)
        first = _FirstToken()
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.generate(node.url, asked, first, first_s=timeout_s, gap_s=timeout_s)
        except TimeoutError:
            return f"it made no token in {timeout_s:g} s"
        except KVFerryError as error:
            return error.message
        if not first.came:
            return "it ended its answer without a token"
        works(node, self._clock.now())
        return ""

    def _not_asked(self, node: KnownNode, error: NoDescriptorsError) -> None:
        """By our own fault: what is known of the node stays. Said once, until one can be asked again."""
        if node.report is None:
            node.problem = error.message
        if not self._could_not_ask:
            log_fields(_log, logging.WARNING, "no_descriptors", node=node.id, why=error.message)
        self._could_not_ask = True

    def _unanswered(self, node: KnownNode, asked_at: float) -> None:
        if node.silent_since is None:
            node.silent_since = asked_at
        silent_s = self._clock.now() - node.silent_since
        rounds = self._limits.lost_rounds_lapsed if node.lapsed else self._limits.lost_rounds
        without = ", its lease has ended" if node.lapsed else ""
        error = NodeUnavailableError(f"node {node.id} has answered nothing for {silent_s:.0f} s{without}")
        if silent_s >= (self._config.probe_interval_s + self._config.connect_timeout_s) * rounds:
            tell = self.on_lost
        else:
            tell = self.on_silent if node.problem is not None or node.misses > 1 else []
        for one in tell:
            one(node.id, error)
