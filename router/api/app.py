"""The router's HTTP surface: OpenAI's endpoints, and what the router says about itself. A thin shell.

Owns routes, body limits, request ids and the OpenAPI document. Bodies are decoded by msgspec, not by the framework.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from email.utils import formatdate
from functools import partial
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvcore.errors import KVFerryError
from kvcore.process.http_body import body_of
from kvcore.telemetry import METRICS_CONTENT_TYPE
from router.admission.no_node import NoNodeWait
from router.answering import Answerer
from router.api import openapi
from router.api.anthropic.errors import AnthropicErrorReply, AnthropicErrors, anthropic_event
from router.api.anthropic.message_format import MessagesFormatter
from router.api.anthropic.messages import MessagesRequest, chat_of, their_name
from router.api.asked import AnswerStart, Asked, asked_as
from router.api.body import parse
from router.api.fields.batch_fields import BatchBody, batch_of
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.completion_fields import CompletionRequest
from router.api.formats.completion_format import CompletionFormatter
from router.api.formats.parsed_chat import chat_formatter
from router.api.front import Cors, IdentifiedApp, PlainPaths, RequestIds, StraightWay
from router.api.http_errors import ErrorReply, error_reply, headers_of
from router.api.limits import ApiLimits
from router.api.new_ids import new_id
from router.api.openai_responses.kept import KeptResponses
from router.api.openai_responses.request import ResponsesRequest
from router.api.openai_responses.routes import ResponsesDoor
from router.api.pooling_routes import PoolingServers, add_pooling_routes
from router.api.responses import AnswerResponse, JsonReply, error_response, failed_event
from router.api.silences import Silences
from router.api.text_routes import add_probe_routes, add_text_routes
from router.api.tokens_in.asked import generate_asked
from router.api.tokens_in.request import GenerateBody
from router.metrics import RouterMetrics
from router.processes.routes import add_own
from router.processes.view import RouterView
from router.tenants.callers import Caller, caller_of
from router.text.model_habits import ModelHabits

Endpoint = Callable[[Scope, Receive], Awaitable[ASGIApp]]
"""Of a request, makes what answers it."""
_log = logging.getLogger("router")
_Body = TypeVar("_Body", ChatRequest, BatchBody, CompletionRequest, MessagesRequest, ResponsesRequest, GenerateBody)


def make_app(
    answerer: Answerer,
    view: RouterView,
    metrics: RouterMetrics,
    *,
    max_body_bytes: int,
    cors: Collection[str] = (),
    limits: ApiLimits = ApiLimits(),
    more: Callable[[FastAPI], None] = lambda _app: None,
    guard: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    no_node: NoNodeWait | None = None,
    habits: ModelHabits = ModelHabits(),
    pooling: PoolingServers | None = None,
    kept: KeptResponses | None = None,
) -> ASGIApp:
    """The ASGI application. Its OpenAPI document is at /openapi.json. `cors`: as in the cluster file. `more` adds the
    routes that are not this package's, `guard` what refuses requests before they get to one. `no_node`: where requests
    wait while no node is up; None: they are refused. `habits`: of the model that is served. `kept`: where answers of
    /v1/responses are kept; None: nowhere."""
    app = FastAPI(title="kvferry router", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_errors(app)
    endpoints = _add_openai(
        app, answerer, max_body_bytes, limits, no_node=no_node, habits=habits, door=ResponsesDoor(kept)
    )
    add_text_routes(app, answerer, max_body_bytes, limits)
    add_probe_routes(app, view)
    add_pooling_routes(app, pooling, max_body_bytes, limits)
    _add_status(app, view)
    add_own(app, view)
    more(app)
    ids, guarded = RequestIds(metrics), guard(ShortWay(app, endpoints))
    return StraightWay(
        ids, guarded, endpoints, other=PlainPaths(IdentifiedApp(AnthropicErrors(Cors(guarded, cors)), ids))
    )


class ShortWay:
    """Sends posts of the token routes straight to their endpoints: FastAPI's stack takes a sixth of a short request's
    time and does nothing for them. The routes stay in FastAPI, for wrong methods and for the OpenAPI document."""

    def __init__(self, app: FastAPI, endpoints: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints
        self._routes = {route.path: route for route in app.routes if isinstance(route, APIRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = self._routes[scope["path"]]
        response: ASGIApp
        try:
            response = await endpoint(scope, receive)
        except KVFerryError as error:
            response = error_response(error)
        except Exception:  # request boundary
            _log.exception("request_failed")
            response = _internal_error()
        await response(scope, receive, send)


def _internal_error() -> Response:
    return JsonReply(error_reply(500, "internal error", code="internal_error"), 500)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(KVFerryError)
    async def own_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, KVFerryError)
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        code = {404: "unknown_route", 405: "method_not_allowed"}.get(status)
        text = f"{request.method} {request.url.path}: {error.detail}"
        headers = {**(error.headers or {}), **headers_of(status)}
        return JsonReply(error_reply(status, text, code=code), status, headers)

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        return _internal_error()


def _add_openai(
    app: FastAPI,
    answerer: Answerer,
    max_body_bytes: int,
    limits: ApiLimits,
    *,
    no_node: NoNodeWait | None,
    habits: ModelHabits,
    door: ResponsesDoor,
) -> dict[str, Endpoint]:
    """Returns the endpoints of the token routes, by path."""
    endpoints: dict[str, Endpoint] = {}
    starts = AnswerStart(answerer, limits, no_node=no_node, habits=habits)
    silences = Silences(limits.look_s)

    def generates(
        name: str,
        path: str,
        kind: type[_Body],
        asked: Callable[[_Body, Caller, int], Awaitable[Asked]],
        *,
        id_prefix: str,
        failed: Callable[[KVFerryError], bytes] = failed_event,
        error: type[msgspec.Struct] = ErrorReply,
    ) -> None:
        async def answer(scope: Scope, receive: Receive) -> AnswerResponse:
            raw = await body_of(scope, receive, max_body_bytes, timeout_s=limits.body_timeout_s)
            wants = await asked(parse(raw, kind), caller_of(scope), len(raw))
            start = partial(starts.start, wants, scope, f"{id_prefix}{new_id()}")
            stream = bool(wants.body.stream)
            return AnswerResponse(
                start, stream=stream, send_timeout_s=limits.send_timeout_s, failed=failed, silences=silences
            )

        @app.post(path, name=name, **openapi.answers(kind, error))
        async def documented() -> Response:
            raise AssertionError("its posts go the short way")

        endpoints[path] = answer

    paths = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/inference/v1/generate"
    generates("chat", paths[0], ChatRequest, asked_as(chat_formatter, lambda body: body), id_prefix="chatcmpl-")
    batch = asked_as(chat_formatter, batch_of)
    generates("chat_batch", f"{paths[0]}/batch", BatchBody, batch, id_prefix="chatcmpl-")
    completion = asked_as(CompletionFormatter, lambda body: body)
    generates("completions", paths[1], CompletionRequest, completion, id_prefix="cmpl-")
    theirs = asked_as(MessagesFormatter, chat_of, their_name)
    generates(
        "messages",
        paths[2],
        MessagesRequest,
        theirs,
        id_prefix="msg-",
        failed=anthropic_event,
        error=AnthropicErrorReply,
    )
    generates("generate", paths[3], GenerateBody, generate_asked, id_prefix="generate-tokens-")
    generates("responses", "/v1/responses", ResponsesRequest, door.asked, id_prefix="resp_")
    door.add_to(app)
    _add_models(app, answerer)
    return endpoints


def _add_models(app: FastAPI, answerer: Answerer) -> None:
    created = int(time.time())

    def served(name: str, adapter: str | None) -> dict[str, object]:
        """`adapter`: the path of the one that has this name; None: it is the model's."""
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "kvferry",
            "root": answerer.model if adapter is None else adapter,
            "parent": None if adapter is None else answerer.model,
            "max_model_len": answerer.max_context,
        }

    @app.get("/v1/models", **openapi.plain("The names of the model that is served, and of its adapters"))
    async def models() -> Response:
        named: dict[str, str | None] = {**answerer.adapters.paths(), **dict.fromkeys(answerer.names)}
        listed = sorted(named, key=lambda name: named[name] is not None)  # the model's own names come first
        return JsonReply({"object": "list", "data": [served(name, named[name]) for name in listed]})

    @app.get("/v1/models/{name:path}", **openapi.plain("One model", not_found=True))
    async def model(name: str) -> Response:
        answerer.check_model(name)
        return JsonReply(served(name, None if name in answerer.names else answerer.adapters.paths()[name]))


def _add_status(app: FastAPI, view: RouterView) -> None:
    @app.get("/health", **openapi.plain("Whether a request can be served now", unavailable=True))
    async def health() -> Response:
        problem = view.problem()
        reply = JsonReply({"status": "ok"}) if problem is None else error_response(problem)
        reply.headers["Date"] = formatdate(usegmt=True)  # by which the doctor compares clocks
        return reply

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(await view.metrics(), media_type=METRICS_CONTENT_TYPE)

    @app.get("/v1/cluster", **openapi.plain("Nodes, requests, hit rate"))
    async def cluster() -> Response:
        return JsonReply(await view.cluster())

    @app.get("/v1/cache/stats", **openapi.plain("Hit rate in tokens, and what was missed and why"))
    async def cache_stats() -> Response:
        return JsonReply(await view.cache_stats())

    @app.get("/v1/cache/advise", **openapi.plain("Chunk length and sizes that would have served the last hour best"))
    async def cache_advise() -> Response:
        return JsonReply(await view.cache.advise())

    @app.get("/v1/requests", **openapi.plain("The last requests, newest first"))
    async def requests(request: Request) -> Response:
        shown = caller_of(request.scope).may_see
        return JsonReply({"requests": await view.newest(shown)})

    @app.get("/v1/requests/{request_id}", **openapi.plain("One request: where it went and why", not_found=True))
    async def one(request_id: str, request: Request) -> Response:
        caller = caller_of(request.scope)
        record = await view.find(request_id, caller.may_see)
        if record is None:
            return JsonReply(error_reply(404, f"no request {request_id!r} among the last", code="unknown_request"), 404)
        # what the policy weighed tells of others' requests, too
        return JsonReply(msgspec.to_builtins(record if caller.admin else record.brief()))
