"""The API keys that a process holds, read again when their file changes. Blocks: call it on a thread."""

import logging
import os
import stat
from pathlib import Path

from kvcore.config.security import KeysConfig
from kvcore.errors import ConfigError
from kvcore.telemetry import log_fields
from kvcore.tenants.keys import BadKeyFileError, KeyRing, parse_keys

_logger = logging.getLogger("kvcore.tenants")
_MAX_BYTES = 16 << 20
_Stamp = tuple[int, int, int]


class KeySource:
    """`ring`: the keys of now. A file that cannot be read any more, or is none, changes nothing and is logged."""

    def __init__(self, config: KeysConfig) -> None:
        """Raises ConfigError."""
        self._path = Path(config.file) if config.file is not None else None
        self._seen: _Stamp | None = None
        self._complained = ""
        if self._path is not None:
            first = self._read_if_changed(self._path)
            assert first is not None, "nothing was seen before"
            self.ring = first
        else:
            text = os.environ.get(config.env or "")
            if text is None:
                raise ConfigError(f"security.keys.env: there is no environment variable {config.env}")
            self.ring = _ring(text, f"security.keys.env: {config.env}")

    def __repr__(self) -> str:
        return f"<KeySource {self._path or 'of the environment'}: {self.ring!r}>"

    def refresh(self) -> bool:
        """Whether `ring` is another one than before. Microseconds, unless the file changed."""
        if self._path is None:
            return False
        try:
            found = self._read_if_changed(self._path)
        except ConfigError as error:
            if error.message != self._complained:
                self._complained = error.message
                log_fields(_logger, logging.ERROR, "keys_not_reloaded", reason=error.message)
            return False
        self._complained = ""
        if found is None:
            return False
        self.ring = found
        log_fields(_logger, logging.INFO, "keys_reloaded", keys=len(found), tenants=len(found.tenants))
        return True

    def _read_if_changed(self, path: Path) -> KeyRing | None:
        """None: as before. Raises ConfigError."""
        where = f"security.keys.file: {path}"
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
            if stamp == self._seen:
                return None
            with path.open("rb") as file:
                _check_mode(os.fstat(file.fileno()), where)
                text = file.read(_MAX_BYTES + 1)
        except FileNotFoundError as error:
            self._seen = None
            raise ConfigError(f"{where}: no such file; `kvferry keys create` makes it") from error
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read: {error.strerror}") from error
        if len(text) > _MAX_BYTES:
            raise ConfigError(f"{where}: longer than {_MAX_BYTES} bytes")
        made = _ring(text, where)
        self._seen = stamp
        return made


def _check_mode(found: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{where}: not a file")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(f"{where}: mode {mode:04o} lets others add keys; set 0600, or 0640 for its group")
    if found.st_uid not in (0, os.geteuid()):
        who = f"user {found.st_uid}, who can add keys, and this process runs as {os.geteuid()}"
        raise ConfigError(f"{where}: it belongs to {who}")


def _ring(text: str | bytes, where: str) -> KeyRing:
    try:
        return KeyRing(parse_keys(text))
    except BadKeyFileError as error:
        raise ConfigError(f"{where}: {error}; `kvferry keys create` makes one") from None
