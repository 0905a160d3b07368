"""What vLLM's server answers of models that pool: embeddings, scores, classes. Handed on, or refused by name.

kvferry's engines generate text. Servers that run already may serve a model that pools; kvferry adds nothing to that.
"""

from typing import Protocol

from fastapi import FastAPI, Request
from starlette.responses import Response

from kvcore.process.http_body import read_body
from router.api import openapi
from router.api.http_errors import error_reply
from router.api.limits import ApiLimits
from router.api.responses import JsonReply
from router.tenants.paths import POOLING

_WHAT_COULD = (
    "the engines of this cluster generate text and pool nothing; vLLM servers of a model that does could, behind a "
    "router with handoff: nixl or mooncake"
)


class PoolingServers(Protocol):
    """Servers that may know these paths."""

    async def ask(self, path: str, body: bytes) -> bytes:
        """What one of them answers, which is JSON. Raises errors of kvcore.errors."""
        ...


def add_pooling_routes(
    app: FastAPI, servers: PoolingServers | None, max_body_bytes: int, limits: ApiLimits = ApiLimits()
) -> None:
    """`servers` None: the nodes have engines of kvferry's."""

    async def endpoint(request: Request) -> Response:
        path = request.url.path
        if servers is None:
            return JsonReply(error_reply(404, f"POST {path}: {_WHAT_COULD}", code="unknown_route"), 404)
        body = await read_body(request, max_body_bytes, timeout_s=limits.body_timeout_s)
        return Response(await servers.ask(path, body), media_type="application/json")

    for path in sorted(POOLING):
        summary = "Of vLLM servers whose model pools; 404 elsewhere"
        app.post(path, name=path, **openapi.handed_on(summary))(endpoint)
