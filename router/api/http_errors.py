"""OpenAI's error bodies: `{"error": {"message", "type", "param", "code"}}` for every failure, whatever raised it."""

import math

import msgspec

from kvcore.errors import KVFerryError, RateLimitError


class ErrorDetail(msgspec.Struct):
    """`type`: `invalid_request_error` (the client's fault) or `server_error`."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct):
    """The body."""

    error: ErrorDetail


def error_reply(status: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorReply:
    """The body of an answer with this status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorReply(ErrorDetail(message, kind, param, code))


def reply_of(error: KVFerryError) -> ErrorReply:
    """The body of one of our errors."""
    made = error_reply(error.http_status, error.message, param=error.param, code=error.code)
    if isinstance(error, RateLimitError):
        made.error.type = error.kind  # as OpenAI has it
    return made


def headers_of(status: int, *, retry_after_s: int = 1) -> dict[str, str]:
    """Retry-After where trying again can help; a body that was not read to its end ends the connection."""
    if status in (429, 503):
        return {"Retry-After": str(retry_after_s)}
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"Connection": "close"} if status in (408, 413, 415) else {}


def headers_for(error: KVFerryError) -> dict[str, str]:
    """Those of an answer with one of our errors."""
    after = math.ceil(error.retry_after_s) if isinstance(error, RateLimitError) else 1
    return headers_of(error.http_status, retry_after_s=max(1, after))
