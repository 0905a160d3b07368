"""Digests of what a model's KV depends on: its weight files and its tokenizer, and the cache of those digests.

Invariant: a cached digest is used only while the file's path and stamp are what they were; a damaged cache costs time,
never a wrong digest.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from kvcore.errors import ModelLoadError
from kvcore.model_folder import file_digest

_log = logging.getLogger(__name__)

DIGEST_CACHE = Path("~/.cache/kvferry/digests.json")


class FileStamp(msgspec.Struct, frozen=True):
    """What is another after a file was written, or replaced. `ctime_ns` is, too, where a copy has kept the times."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> "FileStamp":
        """The file's, now. Raises ModelLoadError."""
        try:
            status = file.stat()
        except OSError as error:
            raise ModelLoadError(f"{file.name} cannot be read: {file}: {error}. Download the model again") from error
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class _Entry(msgspec.Struct, frozen=True):
    """A file's digest, valid while its stamp is this."""

    stamp: FileStamp
    sha256: str


def weights_digest(weight_files: Sequence[Path], digest_cache: Path | None) -> str:
    """Hex SHA-256 over the files' names, sizes and contents' digests, whatever folder they are in.

    Raises ModelLoadError, also when a file is written meanwhile.
    """
    cache_file = digest_cache.expanduser() if digest_cache is not None else None
    known = _read_cache(cache_file) if cache_file is not None else {}
    fresh: dict[str, _Entry] = {}
    total = hashlib.sha256(b"kvferry.weights.v1")
    for file in weight_files:
        real = file.resolve()
        entry, stamp = known.get(str(real)), FileStamp.of(real)
        if entry is None or entry.stamp != stamp:
            entry = _Entry(stamp, file_digest(real))
            check_unchanged({real: stamp})
            fresh[str(real)] = entry
        total.update(f"{file.name}\0{stamp.size}\0{entry.sha256}\n".encode())
    if cache_file is not None and fresh:
        _write_cache(cache_file, known | fresh)
    return total.hexdigest()


def versioned(weights_digest: str, version: str) -> str:
    """The digest of weights that go by a name of their own, `model.version`; without one what their files say."""
    return hashlib.sha256(f"{weights_digest}\0{version}".encode()).hexdigest() if version else weights_digest


def check_unchanged(stamps: Mapping[Path, FileStamp]) -> None:
    """Raises ModelLoadError that names a file whose stamp is another one now."""
    for file, stamp in stamps.items():
        if FileStamp.of(file) != stamp:
            raise ModelLoadError(
                f"{file.name} was written while the model was being loaded: {file}. What was loaded is neither the old "
                "model nor the new one: start again when the copy is complete, and put new weights into a new folder"
            )


def _read_cache(cache_file: Path) -> dict[str, _Entry]:
    try:
        return msgspec.json.decode(cache_file.read_bytes(), type=dict[str, _Entry])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def _write_cache(cache_file: Path, entries: dict[str, _Entry]) -> None:
    """Replaced as a whole, so two engines that start at once lose an entry at worst."""
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache_file.parent, prefix=cache_file.name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(msgspec.json.encode(entries))
        Path(temporary).replace(cache_file)
    except OSError as error:
        _log.warning("digest cache not written: path=%s error=%s", cache_file, error)
