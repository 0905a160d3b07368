"""What `kvferry up` and the demo show while the cluster comes up: a live table on a terminal, plain lines elsewhere.

Owns the terminal while it is open: print through `say`, so that lines and table do not overwrite each other.
"""

from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvferry.launch.launcher import LauncherEvent
from kvferry.launch.supervised import ProcessState

_STYLES = {
    ProcessState.STARTING: "yellow",
    ProcessState.READY: "green",
    ProcessState.DIED: "red",
    ProcessState.FAILED: "bold red",
    ProcessState.STOPPED: "dim",
}


class Display:
    """Shows states by `on_event` and, if `show_lines`, the processes' output by `on_line`."""

    def __init__(self, console: Console, *, show_lines: bool = True) -> None:
        self._console = console
        self._show_lines = show_lines
        self._latest: dict[str, LauncherEvent] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=8, get_renderable=self._table, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_progress()

    def end_progress(self) -> None:
        """Take the live table away; later events come as lines. Idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line (or several) of ours, as it is."""
        self._print(Text(text))

    def write(self, piece: str) -> None:
        """A piece of a line, at once."""
        self._print(Text(piece), end="")

    def on_line(self, name: str, line: str) -> None:
        """A process's output, prefixed with its name."""
        if self._show_lines:
            self._print(Text(f"{name:<16}| ", style="cyan").append(Text(line, style="default")))

    def on_event(self, event: LauncherEvent) -> None:
        """A change of state."""
        self._latest[event.name] = event
        if self._live is None or event.state in (ProcessState.DIED, ProcessState.FAILED):
            self._print(_line(event))

    def _print(self, text: Text, end: str = "\n") -> None:
        with suppress(OSError):  # the terminal is gone: the cluster goes on
            self._console.print(text, end=end, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("process", "state", "pid", "after"):
            table.add_column(heading)
        for name, event in self._latest.items():
            state = Text(event.state.value, style=_STYLES[event.state])
            table.add_row(name, state, str(event.pid or ""), f"{event.after_s:.1f} s")
        return table


def _line(event: LauncherEvent) -> Text:
    text = Text(f"{event.name:<16}  ")
    text.append(event.state.value, style=_STYLES[event.state])
    pid = f" pid {event.pid}" if event.state in (ProcessState.STARTING, ProcessState.READY) else ""
    detail = f" ({event.detail})" if event.detail else ""
    return text.append(f"{pid} after {event.after_s:.1f} s{detail}")
