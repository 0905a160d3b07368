"""The commands of `kvferry blend` that ask a router: each prints, and returns its exit code.

0: done. 1: not, or not all of it; why is said. 2 is a wrong command line, which raises ConfigError.
"""

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcore.clock import SystemClock
from kvferry.blend.folder import read_documents, read_text
from kvferry.cache.asking import AskingCommands
from kvferry.cache.client import CacheCommandError, RouterCalls
from kvferry.cache.tables import age_text
from router.shadow.reports import BlendOrder, BlendReport, BlendTurned, ReuseDivergence
from router.upkeep.reports import PromptWarmed, WarmReply

_ANY_QUESTION = "?"
"""Behind a document that is warmed: what comes there is no part of what is stored."""


@dataclass(frozen=True, slots=True)
class BlendCommands(AskingCommands):
    """What `kvferry blend` asks of a router."""

    def status(self) -> int:
        """Whether documents are reused, what comparisons said, and what was found wrong. 1: something is off or was
        wrong."""
        return self.run(self._status)

    def turn_on(self, kinds: list[str] | None) -> int:
        """Kinds that were turned off; None: all."""
        return self.run(lambda router: self._turn_on(router, kinds))

    def warm(self, folder: Path, header: Path | None) -> int:
        """The documents of a folder. Raises ConfigError."""
        documents, system = read_documents(folder), "" if header is None else read_text(header)
        bodies = [(one.name, warm_body(system, one.text)) for one in documents]
        return self.run(lambda router: self._warm(router, bodies))

    async def _status(self, router: RouterCalls) -> int:
        report = await router.get("/v1/blend", BlendReport)
        if not self._printed(report):
            self._lines(status_lines(report, SystemClock().wall()))
        return 1 if report.divergences or (report.mode != "off" and any(kind.off for kind in report.kinds)) else 0

    async def _turn_on(self, router: RouterCalls, kinds: list[str] | None) -> int:
        turned = await router.post("/v1/blend/on", BlendOrder(kinds=kinds), BlendTurned)
        if not self._printed(turned):
            self._lines([f"on again: {', '.join(turned.kinds)}" if turned.kinds else "nothing was off"])
        return 0

    async def _warm(self, router: RouterCalls, bodies: list[tuple[str, dict[str, object]]]) -> int:
        warmed: dict[str, PromptWarmed] = {}
        for name, body in bodies:
            try:
                reply = await router.post("/v1/cache/warm", body, WarmReply)
            except CacheCommandError as error:
                raise CacheCommandError(f"{name}: {error}") from error
            except asyncio.CancelledError:
                sys.stderr.write(f"stopped: {len(warmed)} of {len(bodies)} documents were warmed, and stay\n")
                raise
            warmed[name] = reply.prompts[0]
        lines = warmed.values()
        if not self._printed(warmed):
            computed, cached = sum(one.computed_tokens for one in lines), sum(one.cached_tokens for one in lines)
            self._lines([f"documents: {len(warmed)}, {computed} tokens computed, {cached} cached before"])
        return self._problems(f"{name}: found no room in the store" for name, line in warmed.items() if line.no_room)


def warm_body(system: str, document: str) -> dict[str, object]:
    """A chat that names one document, behind the system prompt if there is one."""
    parts = [{"type": "text", "text": document, "document": True}, {"type": "text", "text": _ANY_QUESTION}]
    messages: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": parts}]}


def status_lines(report: BlendReport, now: float) -> Iterator[str]:
    """What `kvferry blend status` prints. `now`: Unix seconds."""
    if report.mode == "off":
        yield "documents: not reused (kv.blend.mode is off)"
    else:
        limits = f"at most {report.max_kl:g} nats, at least {report.min_agreement:.0%} of tokens the same"
        yield f"documents: {report.mode}, k {report.k}, {report.shadow:.1%} of requests are compared ({limits})"
    for kind in report.kinds:
        means = "" if kind.kl is None else f": {kind.kl:.3g} nats, {kind.agreement:.0%} over the last {kind.window}"
        state = (
            f"OFF for {age_text(now - kind.since)}: {kind.off}" if kind.off else f"on, {kind.compared} compared{means}"
        )
        yield f"  {kind.kind} of {kind.model}: {state}"
    if any(kind.off for kind in report.kinds):
        yield "  `kvferry blend on` reuses them again"
    share = (
        f"{report.exact_shadow:.1%} of requests are computed again (kv.shadow)"
        if report.exact_shadow
        else "off (kv.shadow)"
    )
    yield f"verification of the cache: {share}"
    if report.comparisons:
        counts = ", ".join(f"{number} {name}" for name, number in sorted(report.comparisons.items()))
        yield f"since the router's start: {counts}, {report.waiting} waiting"
    for one in report.divergences:
        yield from _divergence_lines(one, now)


def _divergence_lines(one: ReuseDivergence, now: float) -> Iterator[str]:
    yield f"WRONG, {age_text(now - one.at)} ago: {one.request_id} on {one.node}, {', '.join(one.sources)}"
    for chunk in one.chunks:
        yield f"  chunk {chunk.number} {chunk.key}: off by {chunk.distance:.3g}"
    if one.replicas:
        yield f"  dropped from the memory of {', '.join(one.replicas)}"
    for left in one.left:
        yield f"  not dropped: {left}"
