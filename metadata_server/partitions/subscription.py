"""Follows the event streams of all partitions, each by itself: what one of them says touches only what it knows."""

import asyncio
from collections.abc import Sequence

from metadata_server.subscription import IndexSubscription


class PartitionedSubscription:
    """See IndexSubscription. `run` it in a task; cancel the task to end it."""

    def __init__(self, streams: Sequence[IndexSubscription]) -> None:
        """One a partition, each with a sink of its own."""
        self._streams = streams

    def __repr__(self) -> str:
        return f"<PartitionedSubscription {', '.join(map(repr, self._streams))}>"

    @property
    def connected(self) -> bool:
        """Whether all streams are up, and their sinks hold a complete state."""
        return all(stream.connected for stream in self._streams)

    @property
    def lag(self) -> float:
        """Seconds since that server was last heard that was not for longest."""
        return max(stream.lag for stream in self._streams)

    @property
    def epoch(self) -> str:
        """The lives of the servers that the sinks' states belong to."""
        return "+".join(stream.epoch for stream in self._streams)

    @property
    def resets(self) -> int:
        """Of all of them, since start."""
        return sum(stream.resets for stream in self._streams)

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for stream in self._streams:
                tasks.create_task(stream.run())

    async def aclose(self) -> None:
        """Release the sources' connections; `run` must have ended. Idempotent."""
        for stream in self._streams:
            await stream.aclose()
