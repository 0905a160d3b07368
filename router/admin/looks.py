"""What operators ask of nodes, tiers and the metadata server through a router: once at a time, however many ask it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from kvcore.errors import OverloadedError

_T = TypeVar("_T")


class SharedLooks:
    """Whoever asks what is being asked gets that answer. A look is not ended by those who leave: it has bounds of its
    own, and its answer is for whoever is left."""

    def __init__(self, most: int = 4) -> None:
        """`most`: of different looks at a time; more are refused."""
        self._most = most
        self._under_way: dict[str, asyncio.Task[Any]] = {}

    def __repr__(self) -> str:
        return f"<SharedLooks {', '.join(self._under_way) or 'none'} under way>"

    async def of(self, what: str, look: Callable[[], Awaitable[_T]]) -> _T:
        """The answer of `look`, which is called if nobody asks for `what` now. Raises OverloadedError."""
        task = self._under_way.get(what)
        if task is None:
            if len(self._under_way) >= self._most:
                raise OverloadedError(f"{len(self._under_way)} other questions to the cluster are under way; ask later")
            task = asyncio.ensure_future(_answer(look))
            self._under_way[what] = task
            task.add_done_callback(lambda done: self._over(what, done))
        return cast(_T, await asyncio.shield(task))

    def _over(self, what: str, done: asyncio.Task[Any]) -> None:
        self._under_way.pop(what, None)
        if not done.cancelled():
            done.exception()  # whoever asked has it; perhaps nobody is left


async def _answer(look: Callable[[], Awaitable[_T]]) -> _T:
    return await look()
