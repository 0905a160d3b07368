"""The secrets that a process holds: one, or two while they are changed, read again when their file changes."""

import logging
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from kvcore.clock import Clock, SystemClock
from kvcore.config.security import SecretConfig
from kvcore.errors import ConfigError
from kvcore.telemetry import log_fields
from kvcore.trust.files import FileStamp, check_private, stamp
from kvcore.trust.keys import ClusterKey, KeyLabel
from kvcore.trust.secret_text import BadSecretError, parse_secrets

_logger = logging.getLogger("kvcore.trust")
_MAKE_IT = "`kvferry secret new FILE` makes one"

Reread = Callable[[], tuple[bytes, ...] | None]
"""What the secrets are now; None: the same as before. Raises ConfigError."""


class Secrets:
    """What is derived from the cluster's secrets. One a process. Ask it each time: they may have changed."""

    def __init__(
        self,
        secrets: tuple[bytes, ...],
        *,
        reread: Reread | None = None,
        clock: Clock | None = None,
        look_s: float = 1.0,
    ) -> None:
        """`secrets`: the one that signs first. With a clock, whoever asks looks for others once in `look_s`."""
        self._reread = reread
        self._clock = clock if reread is not None else None
        self._look_s = look_s
        self._looked = clock.now() if clock is not None else 0.0
        self._keys = tuple(ClusterKey(secret) for secret in secrets)
        self._complained = ""

    def __repr__(self) -> str:
        return f"<Secrets {', '.join(key.id.hex() for key in self._keys)}>"

    @property
    def newest(self) -> ClusterKey:
        """The one that signs."""
        return self.accepted[0]

    @property
    def accepted(self) -> tuple[ClusterKey, ...]:
        """All that are accepted, the newest first."""
        if self._clock is not None and (now := self._clock.now()) - self._looked >= self._look_s:
            self._looked = now
            self.refresh()
        return self._keys

    def find(self, key_id: bytes) -> ClusterKey | None:
        """The accepted one that is called so."""
        return next((key for key in self.accepted if key.id == key_id), None)

    def derive(self, label: KeyLabel, context: bytes = b"") -> bytes:
        """32 bytes of the newest."""
        return self.newest.derive(label, context)

    def derive_all(self, label: KeyLabel, context: bytes = b"") -> tuple[bytes, ...]:
        """32 bytes of each that is accepted, the newest first."""
        return tuple(key.derive(label, context) for key in self.accepted)

    def refresh(self) -> bool:
        """Whether the secrets are others than before: their file was looked at, and read if it changed. One that cannot
        be read or is none changes nothing and is logged. Microseconds, unless it changed."""
        try:
            secrets = self._reread() if self._reread is not None else None
        except ConfigError as error:
            if error.message != self._complained:  # a file that is away is so for many looks
                log_fields(_logger, logging.ERROR, "secret_not_reloaded", reason=error.message)
            self._complained = error.message
            return False
        self._complained = ""
        if secrets is None:
            return False
        known = {key.id: key for key in self._keys}
        made = [ClusterKey(secret) for secret in secrets]
        self._keys = tuple(known.get(key.id, key) for key in made)
        log_fields(_logger, logging.INFO, "secret_reloaded", signs=self._keys[0].id, accepted=len(self._keys))
        return True


def open_secrets(config: SecretConfig | None, clock: Clock | None = None) -> Secrets | None:
    """The secrets of a cluster file; None: it has none. Blocking, once at start: reads the file, or runs the command.

    Raises ConfigError, which says what is wrong and shows nothing of the secret.
    """
    if config is None:
        return None
    if config.file is not None:
        file = _SecretFile(Path(config.file))
        first = file.read_if_changed()
        assert first is not None
        return Secrets(first, reread=file.read_if_changed, clock=clock or SystemClock())
    if config.env is not None:
        text = os.environ.get(config.env)
        if text is None:
            raise ConfigError(f"security.secret.env: there is no environment variable {config.env}")
        return Secrets(_parsed(text, f"security.secret.env: {config.env}"))
    command = config.command or []
    if config.every_s is None:
        return Secrets(_printed(command))
    own = clock or SystemClock()
    rerun = _SecretCommand(command, config.every_s, own)
    return Secrets(rerun.last, reread=rerun.take_if_changed, clock=own)


class _SecretFile:
    """A file with secrets, read when it is another than before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: FileStamp | None = None

    def read_if_changed(self) -> tuple[bytes, ...] | None:
        """None: as before. Raises ConfigError once for each change that is no good."""
        where = f"security.secret.file: {self._path}"
        try:
            found = self._path.stat()
            if (seen := stamp(found)) == self._seen:
                return None
            self._seen = seen
            with self._path.open(encoding="ascii") as file:
                check_private(os.fstat(file.fileno()), where)
                text = file.read(1 << 16)
        except FileNotFoundError as error:
            self._seen = None
            raise ConfigError(f"{where}: no such file; {_MAKE_IT}") from error
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: not a text; {_MAKE_IT}") from None
        return _parsed(text, where)


class _SecretCommand:
    """A command that is run again in a thread of its own: whoever asks for the secret never waits for it."""

    def __init__(self, command: list[str], every_s: float, clock: Clock) -> None:
        self._command, self._every_s, self._clock = command, every_s, clock
        self.last = _printed(command)
        self._due = clock.now() + every_s
        self._running: threading.Thread | None = None
        self._came: tuple[bytes, ...] | ConfigError | None = None

    def take_if_changed(self) -> tuple[bytes, ...] | None:
        """None: as before, as far as is known. Raises ConfigError once for each run that came to nothing."""
        came, now = self._came, self._clock.now()
        if came is None and now >= self._due and (self._running is None or not self._running.is_alive()):
            self._due = now + self._every_s
            self._running = threading.Thread(target=self._run, name="secret's command", daemon=True)
            self._running.start()
        self._came = None if came is not None else self._came
        if isinstance(came, ConfigError):
            raise came
        if came is None or came == self.last:
            return None
        self.last = came
        return came

    def _run(self) -> None:
        try:
            self._came = _printed(self._command)
        except ConfigError as error:
            self._came = error


def _printed(command: list[str]) -> tuple[bytes, ...]:
    return _parsed(_output(command), "security.secret.command: what it prints")


def _parsed(text: str, where: str) -> tuple[bytes, ...]:
    try:
        return parse_secrets(text)
    except BadSecretError as error:
        raise ConfigError(f"{where}: {error}; {_MAKE_IT}") from None


def _output(command: list[str], timeout_s: float = 30.0) -> str:
    where = f"security.secret.command: {command[0]}"
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{where}: it did not end within {timeout_s:g} s") from None
    if done.returncode != 0:
        raise ConfigError(f"{where}: it ended with {done.returncode}")
    return done.stdout.decode("ascii", errors="replace")
