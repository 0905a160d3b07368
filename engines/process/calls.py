"""What a node keeps of its calls to an engine's process, and how long that process may take for what."""

import asyncio
from dataclasses import dataclass

from engines.process import messages as m
from kvcore.errors import DeadlineExceededError, EngineDiedError, error_from_code


@dataclass(frozen=True, slots=True)
class EngineProcessLimits:
    """How long a child may take."""

    call_s: float = 5.0
    """For calls that the child's loop answers by itself."""
    late_s: float = 2.0
    """The engine watches a request's deadline; we step in when it is this late."""
    stall_s: float = 15.0
    """A child whose loop has not turned for this long is killed, whatever it was doing."""
    pings: int = 6
    """So many pings are sent within `stall_s`."""
    hung_pings: int = 2
    """So many unanswered ones: it hangs for now."""
    stop_s: float = 10.0
    """For an end in good order."""
    exit_status_s: float = 0.25
    """Between the end of the link and the end of the process, whose status is then known."""


CallFrame = m.Prefilled | m.Compared | m.StreamedDelta | m.Done | m.Failure | m.Sample


class Call:
    """What the child said about one call, until its caller has taken it. Holds at most a window and the end."""

    def __init__(self, call_id: int) -> None:
        self.id = call_id
        self.ended = False
        self._arrived: asyncio.Queue[CallFrame | EngineDiedError] = asyncio.Queue(m.STREAM_WINDOW + 1)

    def put(self, item: CallFrame | EngineDiedError) -> None:
        """Raises asyncio.QueueFull if the child sent more than it was allowed."""
        if isinstance(item, m.StreamedDelta) and self._arrived.qsize() >= m.STREAM_WINDOW:
            raise asyncio.QueueFull
        self._arrived.put_nowait(item)
        self.ended = not isinstance(item, m.StreamedDelta)

    async def next(self, deadline: float) -> CallFrame:
        """The next frame, in order. Raises what the child reports, EngineDiedError, DeadlineExceededError."""
        try:
            async with asyncio.timeout_at(deadline):
                item = await self._arrived.get()
        except TimeoutError as error:
            raise DeadlineExceededError("the engine did not answer in time") from error
        if isinstance(item, EngineDiedError):
            raise item
        if isinstance(item, m.Failure):
            raise error_from_code(item.code, item.message)
        return item
