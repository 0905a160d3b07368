"""Posts to the other routers and processes: one session for all of them, opened as they are asked."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp

from kvcore.process.http_client import operators_session, processes_session
from kvcore.trust.opening import ClusterTrust

Post = Callable[[str, bytes], Awaitable[bytes]]
"""Posts a body to a URL; the answer's, of status 200. Raises what aiohttp does."""


@asynccontextmanager
async def posting(trust: ClusterTrust, *, apart: bool, timeout_s: float) -> AsyncIterator[Post]:
    """`apart`: the others are processes with ports of their own."""
    made = processes_session if apart else operators_session
    async with made(trust=trust, timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:

        async def post(url: str, body: bytes) -> bytes:
            async with session.post(url, data=body) as reply:
                if reply.status != 200:
                    raise aiohttp.ClientError(f"HTTP {reply.status}")
                return await reply.read()

        yield post
