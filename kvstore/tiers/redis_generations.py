"""Generations of chunks in a Redis or Valkey: listed, marked and cleared over one connection, page after page.

Owns the keys of notes and marks (docs/wire-formats.md, "Chunks in Redis"). All of it runs in a thread. Invariants: no
more is asked at once than a page, nothing goes on when little time is left, every command has one key.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from kvstore.tiers.base import Generation, GenerationList, GenerationMark
from kvstore.tiers.generations import is_spared
from kvstore.tiers.limits import RedisLimits
from kvstore.tiers.resp import RespConnection, RespError, RespRefusal, RespValue, command

_CHUNK, _LIVE, _NOTE = b"kvf1:{", b"kvf1:live:", b"kvf1:note:"
_DIGITS = 32
_TIME_UP = "the time was up"


@dataclass(slots=True)
class RedisGenerations:
    """One look at a server, with what was found so far: a time that runs out loses none of it.

    `incomplete`: why not all was seen; empty: all was.
    """

    limits: RedisLimits
    wall: Callable[[], float]
    incomplete: str = "it did not answer"
    noted_too: bool = False
    """List what is noted of generations without a chunk here too: theirs may be on another node."""
    num_cleared: int = 0
    _counts: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """Fingerprint -> chunks and bytes."""
    _notes: dict[bytes, str] = field(default_factory=dict)
    _marks: dict[bytes, dict[str, GenerationMark]] = field(default_factory=dict)
    """Fingerprint -> owner -> mark."""

    def listed(self) -> GenerationList:
        """What `look` found."""
        found = []
        for one, (num_chunks, num_bytes) in sorted(self._counts.items()):
            found.append(Generation(one, num_chunks, num_bytes, self._notes.get(one, ""), self._marks_of(one)))
        return GenerationList(tuple(found), self.incomplete)

    def look(self, connection: RespConnection) -> None:
        """Count all chunks, and read what was noted of them."""
        self._look_at_marks(connection)
        if self.noted_too:
            for keys in self._pages(connection, _NOTE + b"*"):
                for key in keys:
                    if (fingerprint := _fingerprint(key, _NOTE)) is not None:
                        self._counts.setdefault(fingerprint, (0, 0))
            for fingerprint in self._marks:
                self._counts.setdefault(fingerprint, (0, 0))
        for keys in self._pages(connection, _CHUNK + b"*"):
            lengths = _asked(connection, [command(b"STRLEN", key) for key in keys])
            for key, length in zip(keys, lengths, strict=True):
                fingerprint = _fingerprint(key, _CHUNK)
                if fingerprint is None or not isinstance(length, int):
                    continue
                if fingerprint not in self._counts and len(self._counts) >= self.limits.max_generations:
                    self.incomplete = f"there are more than {self.limits.max_generations} generations"
                    continue
                num_chunks, num_bytes = self._counts.get(fingerprint, (0, 0))
                self._counts[fingerprint] = num_chunks + key.endswith(b"}:0"), num_bytes + length
        found = list(self._counts)
        notes = _asked(connection, [command(b"GET", _NOTE + one.hex().encode()) for one in found])
        for one, note in zip(found, notes, strict=True):
            if isinstance(note, bytes):
                self._notes[one] = note.decode(errors="replace")

    def clear(self, connection: RespConnection, fingerprints: Collection[bytes], own: Collection[str] | None) -> None:
        """Remove the chunks of these, but for those that are spared."""
        if own is not None:
            self._look_at_marks(connection)
            if self.incomplete:
                return
        chosen = {one for one in fingerprints if not is_spared(self._marks_of(one), own)}
        alone = next(iter(chosen)).hex().encode() + b"-" if len(chosen) == 1 else b""
        self.incomplete = ""
        for keys in self._pages(connection, _CHUNK + alone + b"*") if chosen else ():
            mine = [key for key in keys if _fingerprint(key, _CHUNK) in chosen]
            gone = _asked(connection, [command(b"UNLINK", key) for key in mine])
            self.num_cleared += sum(key.endswith(b"}:0") and one == 1 for key, one in zip(mine, gone, strict=True))
        if not self.incomplete:
            noted = [_NOTE + one.hex().encode() for one in chosen]
            noted += [_live_key(one, owner) for one in chosen for owner in self._marks.get(one, ())]
            _asked(connection, [command(b"UNLINK", key) for key in noted])

    def _look_at_marks(self, connection: RespConnection) -> None:
        for keys in self._pages(connection, _LIVE + b"*"):
            left = _asked(connection, [command(b"PTTL", key) for key in keys])
            for key, left_ms in zip(keys, left, strict=True):
                fingerprint = _fingerprint(key, _LIVE)
                if fingerprint is not None and isinstance(left_ms, int) and left_ms > 0:
                    owner = key[len(_LIVE) + _DIGITS + 1 :].decode(errors="replace")
                    mark = GenerationMark(owner, self.wall() + left_ms / 1000)
                    self._marks.setdefault(fingerprint, {})[owner] = mark

    def _marks_of(self, fingerprint: bytes) -> tuple[GenerationMark, ...]:
        return tuple(mark for _, mark in sorted(self._marks.get(fingerprint, {}).items()))

    def _pages(self, connection: RespConnection, pattern: bytes) -> Iterator[list[bytes]]:
        """The keys of this pattern, up to the last one or until a tenth of the time that there is now is left."""
        self.incomplete = _TIME_UP
        cursor, reserve_s = b"0", connection.deadline.remaining() / 10
        while connection.deadline.remaining() > reserve_s:
            scan = command(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % self.limits.scan_keys)
            (reply,) = _asked(connection, [scan])
            if isinstance(reply, RespRefusal):
                self.incomplete = f"it answers {reply.text}"
                return
            match reply:
                case [bytes() as cursor, list() as keys]:
                    yield [key for key in keys if isinstance(key, bytes)]
                case _:
                    raise RespError(f"{str(reply)[:40]} came in place of a page of keys")
            if cursor == b"0":
                self.incomplete = "" if self.incomplete == _TIME_UP else self.incomplete
                return


def mark(connection: RespConnection, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, note_s: float) -> None:
    """See `Tier.mark`. The note ends `note_s` from now."""
    live = _live_key(fingerprint, owner)
    if ttl_s <= 0:
        _asked(connection, [command(b"UNLINK", live)])
        return
    note_key = _NOTE + fingerprint.hex().encode()
    told = command(b"SET", note_key, note.encode(), b"PX", b"%d" % round(note_s * 1000))
    _asked(connection, [command(b"SET", live, b"", b"PX", b"%d" % max(1, round(ttl_s * 1000))), told])


def _live_key(fingerprint: bytes, owner: str) -> bytes:
    return _LIVE + fingerprint.hex().encode() + b":" + owner.encode()


def _fingerprint(key: bytes, before: bytes) -> bytes | None:
    """What stands behind `before`; None: no fingerprint of ours."""
    try:
        fingerprint = bytes.fromhex(key[len(before) : len(before) + _DIGITS].decode())
    except ValueError:
        return None
    return fingerprint if len(fingerprint) == _DIGITS // 2 else None


def _asked(connection: RespConnection, commands: Sequence[bytes]) -> list[RespValue]:
    """The replies to these commands."""
    if commands:
        connection.send(commands, replies=len(commands))
    return [connection.reply() for _ in commands]
