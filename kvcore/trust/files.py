"""Files that hold what nobody else may read, and whether they changed. Blocks for microseconds."""

import os
import stat
from pathlib import Path

from kvcore.errors import ConfigError

FileStamp = tuple[int, int, int, int]
_MODE_REFUSED = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP


def stamp_of(path: Path | str, where: str) -> FileStamp:
    """What is another once the file is. Raises ConfigError, which begins with `where`: it is not there."""
    try:
        found = Path(path).stat()
    except OSError as error:
        raise ConfigError(f"{where}: {path}: {error.strerror}") from error
    return stamp(found)


def stamp(found: os.stat_result) -> FileStamp:
    """As `stamp_of`. Of a changed mode or owner, too: a file that was refused for them is good once they are."""
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def why_not_private(found: os.stat_result) -> str | None:
    """Why others than this process's user, and a group that may read, get at such a file; None: they do not."""
    if not stat.S_ISREG(found.st_mode):
        return "not a file"
    if found.st_mode & _MODE_REFUSED:
        return f"mode {stat.S_IMODE(found.st_mode):04o} lets others at it; set 0600, or 0640 for its group"
    if found.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {found.st_uid}, and this process runs as {os.geteuid()}"
    return None


def check_private(found: os.stat_result, where: str) -> None:
    """Raises ConfigError, which begins with `where`, for a file that others get at."""
    if (why := why_not_private(found)) is not None:
        raise ConfigError(f"{where}: {why}")
