"""Comments in streams that have had nothing to say for a while: what is between a client and the router closes a
connection that is silent, and so does many a client.

Owns who is silent. A comment is a line of server-sent events that begins with a colon; readers skip it (WHATWG HTML,
9.2.6: "authors can include a comment line every 15 seconds or so").
"""

import asyncio
from typing import Protocol

_COMMENT = b": nothing new yet\n\n"


class _Stream(Protocol):
    silent: bool
    """Set here at each look; whatever is sent sets it back."""

    def comment(self, text: bytes) -> None:
        """Send this, if its head is out and its client takes what is sent."""
        ...


class Silences:
    """Of one router, on one loop. A stream gets a comment when two looks in a row found it silent: after one to two
    times `look_s`. A flag and one timer for all of them, as a time for each token would cost what the token does."""

    def __init__(self, look_s: float) -> None:
        self._look_s = look_s
        self._streams: set[_Stream] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Silences {len(self._streams)} streams>"

    def watch(self, stream: _Stream) -> None:
        """From now until it is left."""
        self._streams.add(stream)
        if self._timer is None:
            self._start()

    def leave(self, stream: _Stream) -> None:
        """It has ended, or will say its end next."""
        self._streams.discard(stream)

    def _start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _look(self) -> None:
        self._timer = None
        for stream in self._streams:
            if stream.silent:
                stream.comment(_COMMENT)
            stream.silent = True
        if self._streams:
            self._start()
