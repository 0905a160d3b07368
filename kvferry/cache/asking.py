"""Commands that ask one router: run to their end or to Ctrl-C, print lines or JSON, say what failed in a sentence."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import msgspec
from rich.console import Console

from kvcore.trust.opening import OPEN, ClusterTrust
from kvferry.cache.client import CacheCommandError, RouterCalls, router_calls

STOPPED = 130
"""The exit code after Ctrl-C, as shells have it."""


@dataclass(frozen=True, slots=True)
class AskingCommands:
    """Of one router. `as_json`: one JSON value on stdout in place of lines and tables."""

    url: str
    console: Console
    as_json: bool = False
    trust: ClusterTrust = OPEN
    tenant: str = ""
    """Whose prompts they are; empty: the caller's own."""

    def run(self, work: Callable[[RouterCalls], Awaitable[int]]) -> int:
        """Run `work` to its end, or to Ctrl-C. Returns the exit code."""

        async def with_calls() -> int:
            async with router_calls(self.url, trust=self.trust, tenant=self.tenant) as router:
                return await work(router)

        try:
            return asyncio.run(with_calls())
        except KeyboardInterrupt:
            return STOPPED
        except CacheCommandError as error:
            sys.stderr.write(f"kvferry: error: {error}\n")
            return 1

    def _printed(self, value: object) -> bool:
        if self.as_json:
            print(msgspec.json.encode(value).decode())
        return self.as_json

    def _lines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _problems(self, problems: Iterable[str]) -> int:
        """Says each once, on stderr; the exit code."""
        told = list(dict.fromkeys(problems))
        for problem in told:
            sys.stderr.write(f"kvferry: {problem}\n")
        return 1 if told else 0
