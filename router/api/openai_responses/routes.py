"""`/v1/responses`: from a body to the chat that it asks for, and what is asked of answers that are kept."""

from functools import partial

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from kvcore.errors import InvalidRequestError
from router.api import openapi
from router.api.asked import Asked
from router.api.body import beside_if_large
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.checks import refuse, require
from router.api.openai_responses.items import InputItem
from router.api.openai_responses.kept import KeptResponses
from router.api.openai_responses.request import ResponsesRequest, chat_of_items, items_of, name_here
from router.api.openai_responses.response_format import ResponsesFormatter
from router.api.responses import JsonReply
from router.tenants.callers import Caller, caller_of

_NOT_KEPT = "is not to be had: several routers or processes answer here, and none knows what another one keeps"
_NO_PATH = "that has a `/`, or is `.` or `..`, cannot stand in a path: choose another, or let store be false"
_items = msgspec.json.Decoder(list[InputItem])


class ResponsesDoor:
    """What /v1/responses asks. `kept` None: answers are not kept, as another process may get the next request."""

    def __init__(self, kept: KeptResponses | None) -> None:
        self._kept = kept

    async def asked(self, request: ResponsesRequest, caller: Caller, num_bytes: int) -> Asked:
        """The chat, and how its answer is written. `num_bytes`: of the body. Raises InvalidRequestError,
        ResponseNotFoundError."""
        kept, tenant = self._kept, caller.tenant
        if kept is None:
            require(not request.store, "store", _NOT_KEPT)
            require(request.previous_response_id is None, "previous_response_id", _NOT_KEPT)
        earlier = b"[]"
        if kept is not None and request.previous_response_id is not None:
            earlier = kept.find(tenant, request.previous_response_id, "previous_response_id").items
        num_bytes += len(earlier)
        before, chat = await beside_if_large(num_bytes, partial(_chat, request, earlier))
        reachable = _fits_path(request.request_id or "")
        require(reachable or not request.store, "request_id", _NO_PATH)
        keeps = kept is not None and request.store is not False and reachable
        formatter = partial(
            ResponsesFormatter,
            asked=request,
            items=[*before, *items_of(request)],
            keep=partial(kept.put, tenant) if kept is not None and keeps else None,
        )
        return Asked(chat, formatter, num_bytes, prompt="input", form="text.format", names=name_here)

    def add_to(self, app: FastAPI) -> None:
        """The routes of answers that are kept, to a router's application."""
        one = "/v1/responses/{response_id}"

        @app.get(one, **openapi.plain("An answer that is kept", not_found=True))
        async def kept(response_id: str, request: Request) -> Response:
            refuse("stream", request.query_params.get("stream", "false").lower() not in ("false", "0", ""))
            found = self._there().find(caller_of(request.scope).tenant, response_id)
            return Response(found.body, media_type="application/json")

        @app.delete(one, **openapi.plain("Forget an answer that is kept", not_found=True))
        async def forget(response_id: str, request: Request) -> Response:
            self._there().drop(caller_of(request.scope).tenant, response_id)
            return JsonReply({"id": response_id, "object": "response", "deleted": True})

        @app.post(f"{one}/cancel", **openapi.plain("Refused: no answer is made in the background", not_found=True))
        async def cancel(response_id: str, request: Request) -> Response:
            self._there().find(caller_of(request.scope).tenant, response_id)
            text = "only an answer made in the background can be cancelled; close the connection of this one"
            raise InvalidRequestError(text, param="response_id")

    def _there(self) -> KeptResponses:
        if self._kept is None:
            raise InvalidRequestError(f"response_id {_NOT_KEPT}", param="response_id")
        return self._kept


def _fits_path(response_id: str) -> bool:
    """Whether GET /v1/responses/ID can name it: servers read an encoded `/` as one, and clients leave dots out."""
    return "/" not in response_id and response_id not in (".", "..")


def _chat(request: ResponsesRequest, earlier: bytes) -> tuple[list[InputItem], ChatRequest]:
    """(the items of earlier answers, the chat)."""
    before = _items.decode(earlier)
    return before, chat_of_items(request, before)
