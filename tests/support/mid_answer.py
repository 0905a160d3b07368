"""Kill the decoder of a request while it works for it, however busy the machine is: how tests of a take-over begin."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from support.cluster import ClusterHandle

TRIES = 8
PATIENCE_S = 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TakenOver(Generic[T]):
    """A request whose decoder was killed: what was made of its answer, and its record before and after."""

    answer: T
    before: dict[str, Any]
    after: dict[str, Any]


async def in_mid_answer(record: dict[str, Any]) -> bool:
    """Whether its first token is there."""
    return record["ttft_s"] is not None


async def killed_at_work(
    subject: ClusterHandle,
    ask: Callable[[], Coroutine[Any, Any, T]],
    *,
    at: Callable[[dict[str, Any]], Awaitable[bool]] = in_mid_answer,
) -> TakenOver[T]:
    """`ask` makes one request; its decoder gets SIGKILL once `at` is true of it.

    Where the answer was over before the signal came nobody had to take over: it is asked again, TRIES times at most.
    """
    for _ in range(TRIES):
        known = {record["id"] for record in await _records(subject)}
        asking = asyncio.create_task(ask())

        async def at_work() -> dict[str, Any] | None:
            fresh = [record for record in await _records(subject) if record["id"] not in known]  # noqa: B023 - of this try
            return fresh[0] if fresh and await at(fresh[0]) else None

        before = await subject.until(at_work, PATIENCE_S)
        assert before is not None
        decoder = before["route"]["decoder"]
        pid = subject.launcher.pids[decoder]
        os.kill(pid, signal.SIGKILL)
        answer = await asking
        after = await subject.explain(before["id"])
        if after["retries"]:
            return TakenOver(answer, before, after)
        await subject.launcher.wait_restarted(decoder, pid, PATIENCE_S)
        await subject.until(subject.all_ready, PATIENCE_S)
    raise AssertionError(f"{TRIES} answers were over before their decoder was killed, or nobody took them over")


async def _records(subject: ClusterHandle) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = (await subject._json(f"{subject.url}/v1/requests"))["requests"]
    return records
