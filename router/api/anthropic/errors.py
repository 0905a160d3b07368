"""Errors in Anthropic's form, whatever raised them: `{"type": "error", "error": {"type", "message"}, "request_id"}`.

Source: https://docs.anthropic.com/en/api/errors.
"""

from collections.abc import Mapping
from types import MappingProxyType

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcore.errors import KVFerryError
from kvcore.process.proven_app import carries_proof
from router.api.http_errors import ErrorReply

ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/count_tokens")
_TYPES: Mapping[int, str] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
)


class AnthropicErrorDetail(msgspec.Struct):
    """What is wrong."""

    type: str
    message: str


class AnthropicErrorReply(msgspec.Struct):
    """The body."""

    type: str
    error: AnthropicErrorDetail
    request_id: str


_reply = msgspec.json.Decoder(ErrorReply)


def error_type(status: int) -> str:
    """What Anthropic calls an error of this HTTP status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def anthropic_event(error: KVFerryError) -> bytes:
    """The event by which a stream ends that has failed."""
    return b"event: error\ndata: " + _encoded(error.message, error_type(error.http_status)) + b"\n\n"


class AnthropicErrors:
    """Writes answers that are errors anew, of Anthropic's endpoints. Not for processes of the cluster, which prove
    what they ask: their answers are proved as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or scope["path"] not in ANTHROPIC_PATHS or carries_proof(scope):
            await self._app(scope, receive, send)
            return
        head: Message | None = None
        body = b""

        async def send_as_theirs(message: Message) -> None:
            nonlocal head, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                head = message
            elif head is None:
                await send(message)
            else:  # our errors have short bodies
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    made = _translated(body, head["status"], scope["request_id"])
                    kept = [(name, value) for name, value in head["headers"] if name.lower() != b"content-length"]
                    length = (b"content-length", b"%d" % len(made))
                    named = (b"request-id", scope["request_id"].encode())
                    await send({**head, "headers": [length, named, *kept]})
                    await send({**message, "body": made})

        await self._app(scope, receive, send_as_theirs)


def _translated(body: bytes, status: int, request_id: str) -> bytes:
    try:
        reply = _reply.decode(body)
    except msgspec.DecodeError:  # an answer of nobody's that we know
        return body
    return _encoded(reply.error.message, error_type(status), request_id=request_id)


def _encoded(message: str, kind: str, **more: str) -> bytes:
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}, **more})
