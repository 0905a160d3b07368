"""A server of a test's own in a process of its own: how it is ended, and stood still for a while."""

import signal
import subprocess

from support.process_tree import freeze


class ServerProcess:
    """Its `start` sets `_process`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    @property
    def runs(self) -> bool:
        """It was started and not stopped."""
        return self._process is not None

    def stop(self) -> None:
        """SIGKILL, whatever it is doing. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        freeze(self._process.pid)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
