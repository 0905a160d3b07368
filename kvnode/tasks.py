"""The end of a node's own tasks."""

import asyncio
import logging

from kvcore.telemetry import log_fields

_logger = logging.getLogger("kvnode")


async def cancelled(*tasks: "asyncio.Task[None]") -> None:
    """Cancel them, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        log_fields(_logger, logging.DEBUG, "task_ended", name=task.get_name())
