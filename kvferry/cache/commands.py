"""The commands of `kvferry cache`: each asks the router, prints, and returns its exit code.

0: done. 1: not, or not all of it; why is said. 2 is a wrong command line, which raises ConfigError.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.progress import Progress

from kvcore.clock import SystemClock
from kvcore.errors import ConfigError
from kvferry.cache.asking import AskingCommands
from kvferry.cache.client import CacheCommandError, RouterCalls
from kvferry.cache.inputs import GivenPrompt, read_prompts
from kvferry.cache.tables import (
    clear_lines,
    generations_table,
    lookup_table,
    order_lines,
    warmed_line,
)
from kvferry.hit_rate import hit_rate_lines
from kvferry.status import ClusterAnswer, tiers_table
from router.cache.advice import CacheAdvice
from router.cache.report import CacheStats
from router.upkeep.reports import ClearOrder, ClearReport, GenerationsReport, LookupReply, OrderReply, WarmReply

_Result = TypeVar("_Result")
_AT_ONCE = 4
"""Requests to the router under way; it bounds by itself what it does at once."""


@dataclass(frozen=True, slots=True)
class CacheCommands(AskingCommands):
    """Each is given to `run`, but for `clear`, which asks first."""

    model: str = ""
    """The model or adapter whose KV is meant, where a body does not say; empty: the model alone."""

    async def stat(self, router: RouterCalls) -> int:
        """Hit rate in tokens, and a line a tier."""
        stats = await router.get("/v1/cache/stats", CacheStats)
        cluster = await router.get("/v1/cluster", ClusterAnswer)
        if self._printed({"cache": stats, "tiers": {node.id: node.tiers for node in cluster.nodes}}):
            return 0
        shown = list(hit_rate_lines(stats))
        for one in shown:
            self.console.print(one, soft_wrap=isinstance(one, str))
        self._lines(() if shown else ["no request was answered yet"])
        self._lines([f"problem: {stats.problem}"] if stats.problem else [])
        if any(node.tiers for node in cluster.nodes):
            self.console.print(tiers_table(cluster))
        else:
            self.console.print("there are no tiers: what memory has no room for is lost (tiers in the cluster file)")
        return 0

    async def advise(self, router: RouterCalls) -> int:
        """Which chunk length and sizes would have served the last hour best."""
        advice = await router.get("/v1/cache/advise", CacheAdvice)
        if not self._printed(advice):
            self._lines(advice.advice or ["no prompt came within the last hour: there is nothing to learn from"])
        return 0

    async def ls(self, router: RouterCalls) -> int:
        """Generations, and where they lie."""
        report = await router.get("/v1/cache/generations", GenerationsReport)
        if not self._printed(report):
            self.console.print(generations_table(report, SystemClock().wall()))
        return self._problems(report.incomplete)

    def clear(self, order: ClearOrder, *, yes: bool, ask: Callable[[str], str] | None) -> int:
        """After a yes. `ask`: puts a question to a person; None: there is none."""
        if not yes:
            if ask is None:
                raise ConfigError("clearing asks first, and here is no terminal to ask on: give --yes")
            chosen: list[str] = []
            code = self.run(lambda router: self._preview(router, order, chosen))
            if code or not chosen:
                return code
            try:  # outside of the event loop, where Ctrl-C ends it
                answer = ask("Clear these everywhere? [y/N] ")
            except (EOFError, KeyboardInterrupt):
                answer = ""
            if answer.strip().lower() not in ("y", "yes"):
                self.console.print("nothing was cleared")
                return 1
        return self.run(lambda router: self._clear(router, order))

    async def _preview(self, router: RouterCalls, order: ClearOrder, chosen: list[str]) -> int:
        report = await router.get("/v1/cache/generations", GenerationsReport)
        lines = [line for line in report.generations if line.places and _is_meant(line.fingerprint, line.state, order)]
        if lines:
            self.console.print(generations_table(GenerationsReport(generations=lines), SystemClock().wall()))
        else:
            self.console.print("nothing to clear")
        chosen += [line.fingerprint for line in lines]
        return 0

    async def _clear(self, router: RouterCalls, order: ClearOrder) -> int:
        cleared = await router.post("/v1/cache/clear", order, ClearReport)
        if not self._printed(cleared):
            self._lines(clear_lines(cleared))
        return self._problems(cleared.incomplete)

    async def lookup(self, router: RouterCalls, files: Sequence[str]) -> int:
        """Where prompts lie."""
        prompts = read_prompts(files, self.model)
        replies = await self._each(prompts, lambda one: router.post("/v1/cache/lookup", one.body, LookupReply))
        if not self._printed(replies):
            self.console.print(lookup_table(prompts, replies))
        return self._problems(problem for reply in replies for problem in reply.problems)

    async def order(
        self, router: RouterCalls, kind: str, did: str, files: Sequence[str], ttl_s: float | None = None
    ) -> int:
        """Pin, unpin, evict the chunks of prompts, or give them an end."""
        query = {} if ttl_s is None else {"ttl_s": f"{ttl_s:g}"}
        prompts = read_prompts(files, self.model)
        replies = await self._each(prompts, lambda one: router.post(f"/v1/cache/{kind}", one.body, OrderReply, **query))
        if not self._printed(replies):
            self._lines(order_lines(did, replies))
        return self._problems(problem for reply in replies for problem in reply.problems)

    async def warm(self, router: RouterCalls, files: Sequence[str]) -> int:
        """Prefill prompts into the store. Stopped, it leaves what was stored."""
        prompts = read_prompts(files, self.model)
        replies: list[WarmReply] = []
        with Progress(console=self.console, disable=self.as_json or not self.console.is_terminal) as progress:
            bar = progress.add_task("warming", total=len(prompts))

            async def one(prompt: GivenPrompt) -> None:
                reply = await router.post("/v1/cache/warm", prompt.body, WarmReply)
                replies.append(reply)
                progress.advance(bar)
                for line in () if self.as_json else reply.prompts:
                    self.console.print(warmed_line(prompt.source, line), markup=False, highlight=False, soft_wrap=True)

            try:
                await self._each(prompts, one)
            except asyncio.CancelledError:
                sys.stderr.write(f"stopped: {len(replies)} of {len(prompts)} were warmed, and stay\n")
                raise
        lines = [line for reply in replies for line in reply.prompts]
        if not self._printed(replies):
            computed, cached = sum(one.computed_tokens for one in lines), sum(one.cached_tokens for one in lines)
            self._lines([f"prompts: {len(lines)}, {computed} tokens computed, {cached} cached before"])
        full = sum(line.no_room for line in lines)
        return self._problems([f"{full} prompts found no room in the store"] if full else [])

    async def _each(
        self, prompts: Sequence[GivenPrompt], call: Callable[[GivenPrompt], Awaitable[_Result]]
    ) -> list[_Result]:
        """A few at once. The first that is refused ends all, and is named."""
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(prompt: GivenPrompt) -> _Result:
            async with room:
                try:
                    return await call(prompt)
                except CacheCommandError as error:
                    raise CacheCommandError(f"{prompt.source}: {error}") from error

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt)) for prompt in prompts]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]


def _is_meant(fingerprint: str, state: str, order: ClearOrder) -> bool:
    if order.fingerprints is not None and not fingerprint.startswith(tuple(order.fingerprints)):
        return False
    return (state != "marked" or order.force) and (state == "stale" or not order.stale)
