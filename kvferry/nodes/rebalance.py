"""`kvferry nodes rebalance`: has segments evened out, shows how it goes, and stops it on Ctrl-C.

Exit codes: 0 the segments are even, as far as room and bound allow. 1 it ended otherwise; why is said. 130 Ctrl-C.
"""

import asyncio
import sys
from dataclasses import dataclass

import msgspec
from rich.console import Console

from kvferry.cache.client import RouterCalls
from kvferry.machine import size_text
from metadata_server.cache_messages import RebalanceReply, RebalanceRequest

PATH = "/v1/nodes/rebalance"
_WELL = ("no segment can shed more", "all was moved that was to be")


@dataclass(frozen=True, slots=True)
class RebalanceCommand:
    """For NodesCommands.run. `as_json`: the last report, as one JSON value on stdout, in place of lines."""

    console: Console
    as_json: bool = False
    poll_s: float = 1.0

    async def plan(self, router: RouterCalls, most_bytes: int) -> int:
        """What a run would move."""
        report = await router.get(PATH, RebalanceReply)
        self._lines(*fill_lines(report))
        planned = min(report.to_move_bytes, most_bytes or report.to_move_bytes)
        self._lines(f"at most {size_text(planned)} would be moved" if planned else "nothing would be moved")
        return self._end(report)

    async def even_out(self, router: RouterCalls, most_bytes: int) -> int:
        """Begin a run, and follow it. Cancelled it stops the run."""
        report = await router.post(PATH, RebalanceRequest(action="start", most_bytes=most_bytes), RebalanceReply)
        number, said = report.number, ""
        try:
            while report.running and report.number == number:
                if (text := progress_line(report)) != said:
                    self._lines(said := text)
                await asyncio.sleep(self.poll_s)
                report = await router.get(PATH, RebalanceReply)
        except asyncio.CancelledError:
            report = await router.post(PATH, RebalanceRequest(action="stop"), RebalanceReply)
            self._lines(f"{progress_line(report)}; stopped: nothing is lost, and what was moved stays there")
            raise
        if report.number != number:
            sys.stderr.write("kvferry: another run was begun, or the metadata server was started again\n")
            return self._end(report, 1)
        self._lines(progress_line(report), *fill_lines(report), report.end)
        return self._end(report, 0 if all(why in _WELL for why in report.end.split("; ")) else 1)

    def _end(self, report: RebalanceReply, code: int = 0) -> int:
        if self.as_json:
            sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
        return code

    def _lines(self, *texts: str) -> None:
        for text in () if self.as_json else texts:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress_line(report: RebalanceReply) -> str:
    """How far a run is."""
    return f"{size_text(report.moved_bytes)} of {size_text(report.most_bytes)} moved ({report.moved_chunks} chunks)"


def fill_lines(report: RebalanceReply) -> list[str]:
    """How full each segment is, the fullest first."""
    fills = sorted(report.segments, key=lambda one: (-one.used_bytes / one.size_bytes, one.segment_id))
    lines = [f"{one.node_id}: {one.used_bytes / one.size_bytes:.0%} of {size_text(one.size_bytes)}" for one in fills]
    return [*lines, f"all together: {report.share:.0%}"]
