"""The outputs of one request on their way to who reads them: straight, while the reader waits for them, or in a queue.

Owns their order and what is unread. Decides nothing about the request. A reader's task that is woken for each token
costs as much as all that is done with the token.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Self

from router.requests.events import Emit, Fail, Finish

Take = Callable[[Emit], bool]
"""What a reader does with one output, at once. False: not now, it reads it later; then nothing has been done."""


class Outputs:
    """Of one request, in order. `most`: with so many unread no more are read from nodes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._unread: deque[Emit] = deque()
        self._reader: asyncio.Future[None] | None = None
        """What its reader waits for; done: he has been woken."""
        self._reader_failed: Exception | None = None
        self._room: asyncio.Event | None = None
        """Set again when there is room; made by the first leg that waits for it."""
        self.is_full = False
        """Whether legs must wait for room before they read more."""
        self.take: Take | None = None
        """Set by a reader that can take outputs while it waits for the next one. May call anything of the request."""
        self.end: Finish | Fail | None = None
        """What comes after the last of them."""

    def __len__(self) -> int:
        return len(self._unread)

    def __repr__(self) -> str:
        return f"<Outputs {len(self)} unread, {'open' if self.end is None else 'ended'}>"

    @property
    def num_unread_tokens(self) -> int:
        """Of those that were not read."""
        return sum(len(emit.token_ids) for emit in self._unread) if self._unread else 0

    def add(self, emit: Emit) -> None:
        """The next one. `deliver` follows, once all is done that came with it."""
        self._unread.append(emit)

    def deliver(self) -> None:
        """Hand what is new to the reader, or wake him for it:

        1. He waits, and takes it: nobody is woken.
        2. He waits, and takes it not: it is queued as all that follows, until he has read it all and waits again.
        3. He fails at it: that is no fault of the leg that has brought it, so it is raised where he waits.
        4. He does not wait, as he has not read what came before, or does not read yet: it is queued.
        """
        # `take` may `drop` some: what is unread is looked at anew each time.
        while self._unread and self.take is not None and self._reader is not None and not self._reader.done():
            emit = self._unread.popleft()
            try:
                taken = self.take(emit)
            except Exception as error:  # the reader's; see 3
                self._reader_failed, taken = error, False
            if not taken:
                self._unread.appendleft(emit)
                self._wake_reader()
        if len(self._unread) >= self._most and self.end is None:
            self.is_full = True
        if self._unread or self.end is not None:
            self._wake_reader()

    def close(self, end: Finish | Fail) -> None:
        """No more will come. What has come with the end is delivered before its reader is woken."""
        self.end = end
        if not self._unread:
            self._wake_reader()
        self._has_room()

    def drop(self, index: int) -> None:
        """Those of this completion are not read any more."""
        self._unread = deque([emit for emit in self._unread if emit.index != index])

    async def room(self) -> None:
        """Until it is not full."""
        while self.is_full:
            self._room = self._room or asyncio.Event()
            self._room.clear()
            await self._room.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Emit:
        """The next one that is not taken straight. Raises the error of a request that fails."""
        while True:
            if self._reader_failed is not None:
                raise self._reader_failed
            if self._unread:
                emit = self._unread.popleft()
                if self.is_full and len(self._unread) < self._most:
                    self._has_room()
                return emit
            if self.end is not None:
                if isinstance(self.end, Fail):
                    raise self.end.error
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _has_room(self) -> None:
        self.is_full = False
        if self._room is not None:
            self._room.set()
