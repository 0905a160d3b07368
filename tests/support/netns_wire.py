"""The wire between two network namespaces, in user space: `python netns_wire.py FD FD SEED`, two taps by descriptor.

It does what `tc netem` would, on any kernel with /dev/net/tun; what is lost is drawn from the seed. A line on stdin,
`DELAY_S LOSS`, sets what holds from then on (loss 1: the wire is cut) and is answered by a line. Ends with stdin.
"""

import os
import random
import selectors
import sys
import time
from collections import deque

_MAX_FRAME_BYTES = 65_536
_MAX_QUEUED = 4096
"""Frames under way; one more is lost, as in any switch."""


class Wire:
    """Frames from one end to the other, in order."""

    def __init__(self, ends: tuple[int, int], seed: int) -> None:
        self._other = {ends[0]: ends[1], ends[1]: ends[0]}
        self._draw = random.Random(seed)
        self._under_way: deque[tuple[float, int, bytes]] = deque()
        self.delay_s = 0.0
        self.loss = 0.0

    def take(self, end: int) -> None:
        """A frame came in at `end`."""
        frame = os.read(end, _MAX_FRAME_BYTES)
        if self._draw.random() >= self.loss and len(self._under_way) < _MAX_QUEUED:
            self._under_way.append((time.monotonic() + self.delay_s, self._other[end], frame))

    def deliver(self) -> float | None:
        """Hand over what is due; seconds until the next is."""
        while self._under_way:
            due_at, end, frame = self._under_way[0]
            if (wait_s := due_at - time.monotonic()) > 0:
                return wait_s
            self._under_way.popleft()
            try:
                os.write(end, frame)
            except OSError:
                continue  # that end is down
        return None


def main() -> None:
    """Until the end of stdin."""
    ends = int(sys.argv[1]), int(sys.argv[2])
    wire = Wire(ends, int(sys.argv[3]))
    with selectors.DefaultSelector() as selector:
        for source in (*ends, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(wire.deliver()):
                if key.fd != sys.stdin.fileno():
                    wire.take(key.fd)
                    continue
                line = sys.stdin.readline()
                if not line:
                    return
                wire.delay_s, wire.loss = map(float, line.split())
                print("set", flush=True)


if __name__ == "__main__":
    main()
