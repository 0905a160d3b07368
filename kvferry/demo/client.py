"""A client of the router's public API, as the demo needs it: one streamed chat and its record.

Owns an HTTP session. Knows nothing of nodes but what `/v1/requests/{id}` tells.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from kvcore.errors import KVFerryError
from kvcore.process.http_client import http_session
from nodeapi.messages import Moved


class _RecordLeg(msgspec.Struct, kw_only=True):
    moved: list[Moved] = []


class _RecordRoute(msgspec.Struct, kw_only=True):
    prefiller: str | None = None
    decoder: str = ""


class _Record(msgspec.Struct, kw_only=True):
    state: str
    route: _RecordRoute | None = None
    legs: list[_RecordLeg] = []


class _ChatDelta(msgspec.Struct, kw_only=True):
    content: str | None = None


class _ChatChoice(msgspec.Struct, kw_only=True):
    delta: _ChatDelta


class _CachedTokens(msgspec.Struct, kw_only=True):
    cached_tokens: int = 0
    approximate_tokens: int = 0


class _ChatUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None


class _ChatError(msgspec.Struct, kw_only=True):
    message: str


class _ChatEvent(msgspec.Struct, kw_only=True):
    id: str = ""
    choices: list[_ChatChoice] = []
    usage: _ChatUsage | None = None
    error: _ChatError | None = None


@dataclass(frozen=True, slots=True)
class ChatResult:
    """One answered chat. Times are measured by the client; routes and moves are what the router recorded."""

    text: str
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefiller: str | None
    decoder: str
    moved: list[Moved]
    approximate_tokens: int = 0
    """Of documents that were computed elsewhere; `cached_tokens` are exact."""


class DemoClient:
    """Talks to one router; an async context manager."""

    def __init__(
        self, router_url: str, model: str, timeout_s: float, *, record_s: float = 3.0, poll_s: float = 0.05
    ) -> None:
        """`timeout_s` is that of a chat, `record_s` that of its record, which may be written after the stream's end."""
        self._record_s, self._poll_s = record_s, poll_s
        self._url = router_url
        self._model = model
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = http_session(timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def chat(
        self,
        system: str,
        question: str,
        *,
        max_tokens: int,
        on_text: Callable[[str], None],
        documents: Sequence[Mapping[str, str]] = (),
    ) -> ChatResult:
        """Ask greedily; `on_text` gets the answer's pieces as they come. Raises KVFerryError if it is not answered."""
        body: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if documents:
            body["documents"] = documents
        loop = asyncio.get_running_loop()
        began = loop.time()
        ttft_s: float | None = None
        pieces: list[str] = []
        request_id, usage = "", None
        async for event in self._events(body):
            request_id, usage = event.id or request_id, event.usage or usage
            for piece in (choice.delta.content for choice in event.choices):
                if piece:
                    ttft_s = ttft_s or loop.time() - began
                    pieces.append(piece)
                    on_text(piece)
        if usage is None:
            raise KVFerryError("the router's stream ended without a usage")
        record, reused = await self._record(request_id), usage.prompt_tokens_details or _CachedTokens()
        route = record.route or _RecordRoute()
        return ChatResult(
            text="".join(pieces),
            ttft_s=ttft_s or 0.0,
            total_s=loop.time() - began,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=reused.cached_tokens,
            approximate_tokens=reused.approximate_tokens,
            completion_tokens=usage.completion_tokens,
            prefiller=route.prefiller,
            decoder=route.decoder,
            moved=[moved for leg in record.legs for moved in leg.moved],
        )

    async def _events(self, body: dict[str, object]) -> AsyncIterator[_ChatEvent]:
        assert self._session is not None
        try:
            async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as reply:
                if reply.status != 200:
                    raise KVFerryError(f"the router answered HTTP {reply.status}: {(await reply.text())[:500]}")
                async for line in reply.content:
                    data = line.strip().removeprefix(b"data:").strip()
                    if not line.startswith(b"data:") or data == b"[DONE]":
                        continue
                    event = msgspec.json.decode(data, type=_ChatEvent)
                    if event.error is not None:
                        raise KVFerryError(f"the router broke off: {event.error.message}")
                    yield event
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise KVFerryError(f"the router did not answer: {error or 'no answer in time'}") from error

    async def _record(self, request_id: str) -> _Record:
        """The router's record of the request; waits a moment for a leg that ends after the stream."""
        assert self._session is not None
        url = f"{self._url}/v1/requests/{request_id}"
        try:
            async with asyncio.timeout(self._record_s):
                while True:
                    async with self._session.get(url) as reply:
                        if reply.status != 200:
                            raise KVFerryError(f"{url}: HTTP {reply.status}")
                        record = msgspec.json.decode(await reply.read(), type=_Record)
                    if record.state != "running":
                        return record
                    await asyncio.sleep(self._poll_s)
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise KVFerryError(f"{url}: {error or 'still running'}") from error
