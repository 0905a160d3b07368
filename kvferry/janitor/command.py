"""`kvferry janitor`: asks the router what is orphaned, says it, and has it removed if that is asked for.

Exit codes: 0 nothing is orphaned, or all of it was removed; 1 something is; 2 it cannot be told, of all or of a part.
"""

import asyncio
import sys
from dataclasses import dataclass

import msgspec
from rich.console import Console

from kvcore.trust.opening import OPEN, ClusterTrust
from kvferry.cache.client import CacheCommandError, RouterCalls, router_calls
from kvferry.cache.tables import age_text
from metadata_server.account_messages import OrphansOfKind
from router.admin.reports import JanitorOrder, JanitorRemoved, JanitorReport

FOUND, UNKNOWN = 1, 2
_SHOWN = 5
"""Names in a line."""
_WORDS = {
    "read_leases": (
        "read leases whose readers are not registered",
        "ends them: the chunks that they hold can be evicted",
    ),
    "reservations": ("reservations without a writer", "ends them: their room rests, and is then given to others"),
    "segments": ("segments of nodes that are not alive", "forgets them, with all that is listed there"),
    "holdings": ("disks of nodes that are not alive", "forgets what they told of them"),
    "node_orders": ("drains and removals of nodes that nobody knows", "forgets them: such a node is used if it comes"),
    "pins": ("pins of chunks that lie nowhere", "unpins them"),
    "mooncake": ("Mooncake clients' memory whose owner is not registered", "deletes their keys from /metadata"),
    "doctor_records": ("records of doctors that were cut off", "deletes them"),
}


class JanitorDone(msgspec.Struct, kw_only=True):
    """What `--json` prints. `removed`: ids by kind; None: nothing was to be."""

    found: JanitorReport
    removed: dict[str, list[str]] | None = None
    problems: list[str] = []


@dataclass(frozen=True, slots=True)
class JanitorCommand:
    """Of one router. `as_json`: one JSON value on stdout in place of lines."""

    url: str
    console: Console
    older_s: float
    as_json: bool = False
    trust: ClusterTrust = OPEN

    def run(self, *, apply: bool) -> int:
        """Look, and remove what was found if `apply`. Returns the exit code."""
        try:
            return asyncio.run(self._with_calls(apply))
        except CacheCommandError as error:
            sys.stderr.write(f"kvferry: error: {error}\n")
            return UNKNOWN

    async def _with_calls(self, apply: bool) -> int:
        async with router_calls(self.url, trust=self.trust) as router:
            return await self.look(router, apply=apply)

    async def look(self, router: RouterCalls, *, apply: bool) -> int:
        """See `run`. Raises CacheCommandError."""
        found = await router.get(f"/v1/janitor?older_s={self.older_s}", JanitorReport)
        done = JanitorDone(found=found, removed={} if apply else None, problems=list(found.problems))
        for kind in found.kinds:
            self._say_found(kind, apply=apply)
            if done.removed is not None:
                order = JanitorOrder(kind=kind.kind, ids=[one.id for one in kind.listed], older_s=self.older_s)  # type: ignore[arg-type]
                reply = await router.post("/v1/janitor", order, JanitorRemoved)
                done.removed[kind.kind] = reply.removed
                done.problems += reply.problems
                self._say_removed(kind, len(reply.removed))
        self._say_generations(found.stale_generations)
        problems = list(dict.fromkeys(done.problems))
        for problem in problems:
            sys.stderr.write(f"kvferry: cannot tell: {problem}\n")
        if self.as_json:
            sys.stdout.write(msgspec.json.encode(done).decode() + "\n")
        elif not (found.kinds or found.stale_generations or problems):
            self._line("nothing is orphaned")
        if problems:
            return UNKNOWN
        left = found.stale_generations or (found.kinds and not apply) or any(map(_more, found.kinds))
        return FOUND if left else 0

    def _say_found(self, kind: OrphansOfKind, *, apply: bool) -> None:
        what, remedy = _WORDS.get(kind.kind, (kind.kind.replace("_", " "), "removes them"))
        oldest = "" if kind.oldest_s is None else f", the oldest of {age_text(kind.oldest_s)}"
        names = [orphan.name for orphan in kind.listed[:_SHOWN]] + ["..."] * (kind.count > _SHOWN)
        self._line(f"{kind.count} {what}{oldest}: {', '.join(names)}")
        if not apply:
            self._line(f"   --apply {remedy}")

    def _say_removed(self, kind: OrphansOfKind, removed: int) -> None:
        stayed = len(kind.listed) - removed
        why = f"; {stayed} stayed: no longer orphaned, or not to be told" if stayed else ""
        more = f"; {_more(kind)} more were not shown: run it again" if _more(kind) else ""
        self._line(f"   removed {removed}{why}{more}")

    def _say_generations(self, stale: list[str]) -> None:
        if stale:
            names = ", ".join(fingerprint[:8] for fingerprint in stale[:_SHOWN])
            self._line(f"{len(stale)} generations of KV that no live node uses: {names}")
            self._line("   `kvferry cache clear --stale` removes them, with their notes and marks")

    def _line(self, text: str) -> None:
        if not self.as_json:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _more(kind: OrphansOfKind) -> int:
    return kind.count - len(kind.listed)
