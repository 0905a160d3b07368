"""A real process that hosts a segment, to be killed: `python -m support.transfer_child <segment id> <size> <kind>`."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.process_tree import descendants, freeze
from support.transports import transport_config

from kvcore.types import Segment
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import start_segment_hosts


@dataclass
class SegmentProcess:
    process: "subprocess.Popen[str]"
    segment: Segment

    @property
    def pids(self) -> list[int]:
        """The owner, and the process that serves the segment where that is another."""
        return [self.process.pid, *descendants(self.process.pid)]

    def stop(self) -> None:
        """Make them stand still."""
        for pid in self.pids:
            freeze(pid)

    def go_on(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def segment_process(
    segment_id: str, size_bytes: int, kind: str = "auto", *, inside: Sequence[str] = (), host: str = "127.0.0.1"
) -> Iterator[SegmentProcess]:
    """`inside` goes in front of its command; it listens on `host`."""
    process = subprocess.Popen(
        [*inside, sys.executable, "-m", "support.transfer_child", segment_id, str(size_bytes), kind, host],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        addresses = json.loads(process.stdout.readline())
        yield SegmentProcess(
            process,
            Segment(
                id=segment_id,
                node_id="child",
                size_bytes=size_bytes,
                host_id=host_identity(),
                addresses=addresses,
            ),
        )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


async def _serve(segment_id: str, size_bytes: int, kind: str, host: str) -> None:
    memory = SegmentMemory.create(segment_id, size_bytes)
    hosts = await start_segment_hosts(transport_config(kind), memory, host=host)
    sys.stdout.write(json.dumps(hosts.addresses) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
