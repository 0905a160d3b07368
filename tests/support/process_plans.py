"""A process of a cluster file that a test starts itself, beside those that the launcher keeps up."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvferry.launch.processes import ProcessPlan


@contextmanager
def started(plan: ProcessPlan, log: Path, *more: str) -> Iterator[None]:
    """It runs, with `more` after its command and its output in `log`, until it is killed."""
    with log.open("w") as out:
        process = subprocess.Popen([*plan.command, *more], stdout=out, stderr=out)
        try:
            yield
        finally:
            process.kill()
            process.wait()
