"""Tells the other routers and processes of this one's load, and is told of theirs: `POST /v1/process/load`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import aiohttp
import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from kvcore.errors import InvalidRequestError, KVFerryError
from kvcore.process.http_body import read_body
from kvcore.telemetry import log_fields
from kvcore.trust.opening import ClusterTrust
from router.admission.limits import AdmissionLimits
from router.admission.sharing import AdmissionReport, SharedAdmission
from router.api.responses import JsonReply
from router.processes.limits import ProcessLimits
from router.processes.posting import posting
from router.processes.reports import OWN

LOAD = f"{OWN}/load"
_log = logging.getLogger("router")
Send = Callable[[str, bytes], Awaitable[object]]
"""Posts a body to another router's URL. Raises what aiohttp does."""


def add_load(app: FastAPI, shared: SharedAdmission, limits: ProcessLimits = ProcessLimits()) -> None:
    """The route, to a router's application."""

    @app.post(LOAD, include_in_schema=False)
    async def load(request: Request) -> Response:
        body = await read_body(request, limits.max_load_bytes)
        try:
            shared.told(msgspec.msgpack.decode(body, type=AdmissionReport))
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"this is no report of a router's load: {error}") from error
        return JsonReply({})


async def share_load(
    shared: SharedAdmission,
    urls: Sequence[str],
    trust: ClusterTrust,
    *,
    apart: bool,
    limits: AdmissionLimits = AdmissionLimits(),
    process_limits: ProcessLimits = ProcessLimits(),
) -> None:
    """Each of the others by itself: one that hangs delays nobody. `apart`: they are processes with ports of their own.
    Runs until cancelled."""
    others = posting(trust, apart=apart, timeout_s=process_limits.ask_s)
    async with others as post, asyncio.TaskGroup() as tasks:
        for url in urls:
            tasks.create_task(tell_load(shared, f"{url}{LOAD}", post, limits))
        tasks.create_task(_say(shared, limits))


async def tell_load(shared: SharedAdmission, url: str, send: Send, limits: AdmissionLimits) -> None:
    """One of them, again and again; while somebody waits also at each change."""
    changed = asyncio.Event()
    shared.on_change.append(changed.set)
    while True:
        changed.clear()
        try:
            await send(url, msgspec.msgpack.encode(shared.report()))
        except (aiohttp.ClientError, TimeoutError, OSError, KVFerryError) as error:
            log_fields(_log, logging.DEBUG, "load_not_told", url=url, why=f"{type(error).__name__}: {error}")
        await asyncio.sleep(limits.busy_share_s * shared.expected)
        with suppress(TimeoutError):
            async with asyncio.timeout(limits.share_s):
                await changed.wait()


async def _say(shared: SharedAdmission, limits: AdmissionLimits) -> None:
    """Once they have had time to begin: that some are not heard, and that all are."""
    said = shared.problem() if shared.heard else None
    while True:
        await asyncio.sleep(2 * limits.told_lasts_s)
        if (problem := shared.problem()) != said:
            level = logging.INFO if problem is None else logging.WARNING
            log_fields(_log, level, "load_shared", heard=shared.heard, of=shared.expected, problem=problem)
            said = problem
        shared.wake()
