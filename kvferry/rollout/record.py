"""What is written down of a rollout, so that one that was cut off goes on, and one that is over can be taken back.

Owns `rollout.json` in the cluster's state folder on the machine where the rollout was begun. Invariant: a node is in
`drained` from before it is drained by a rollout until after it is used again.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kvcore.errors import ConfigError
from kvcore.state_folder import state_folder


class RolloutRecord(msgspec.Struct, kw_only=True):
    """`target`: the settings that all shall go by, and `before` those to return to, as files of their own; `file`: what
    the user gave. `back`: it returns. `stopped`: why it did not go on."""

    cluster: str
    file: str
    before: str
    target: str
    back: bool = False
    drained: list[str] = []
    done: list[str] = []
    finished: bool = False
    stopped: str = ""

    @property
    def what(self) -> str:
        """It, in words."""
        return f"the way back to {self.target}" if self.back else f"the rollout of {self.file}"


class RecordFile:
    """Reads and writes the record. Blocking. Both raise ConfigError."""

    def __init__(self, cluster: str) -> None:
        self.path = state_folder(cluster) / "rollout.json"

    def read(self) -> RolloutRecord | None:
        """None: nothing was rolled out from here, or it was taken back."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=RolloutRecord)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                f"{self.path}: cannot be read: {error}: remove the file, and look at `kvferry nodes ls` for what the "
                "rollout has left drained"
            ) from error

    def write(self, record: RolloutRecord) -> None:
        """Whole when it returns, or the file is as before."""
        draft = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
            draft.replace(self.path)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}") from error

    def remove(self) -> None:
        """There is nothing to return to any more."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other rollout of this cluster runs on this machine meanwhile. Raises ConfigError: one does."""
        lock = self.path.with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError("another rollout of this cluster is under way on this machine") from None
            yield


def only_record() -> RolloutRecord:
    """The one that there is on this machine, where no file says of which cluster. Raises ConfigError."""
    root = state_folder("")
    found = sorted(root.glob("*/rollout.json")) if root.is_dir() else []
    if len(found) != 1:
        names = ", ".join(path.parent.name for path in found)
        raise ConfigError(f"give a file of the cluster: rollouts were begun here of {names or 'none'}")
    record = RecordFile(found[0].parent.name).read()
    assert record is not None
    return record


def unfinished(cluster: str) -> str:
    """One sentence about a rollout that was begun from this machine and is not finished; empty: there is none. Raises
    ConfigError: its record cannot be read."""
    try:
        file = RecordFile(cluster)
    except ConfigError:  # this user has no folder for such
        return ""
    record = file.read()
    if record is None or record.finished:
        return ""
    drained = f"; drained and not used: {', '.join(record.drained)}" if record.drained else ""
    return f"{record.what} is not finished{f' ({record.stopped})' if record.stopped else ''}{drained}"


def as_path(text: str) -> Path:
    """A file that a record names. Raises ConfigError: it is gone."""
    if not (path := Path(text)).is_file():
        raise ConfigError(f"{path} is gone: roll a file of yours out instead")
    return path
