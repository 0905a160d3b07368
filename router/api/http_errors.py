"""OpenAI's error bodies: `{"error": {"message", "type", "param", "code"}}` for every failure, whatever raised it."""

import msgspec

from kvcore.errors import KVFerryError


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
    return error_reply(error.http_status, error.message, param=error.param, code=error.code)


def headers_of(status: int, *, retry_after_s: int = 1) -> dict[str, str]:
    """Retry-After where trying again can help; a body that was not read to its end ends the connection."""
    if status in (429, 503):
        return {"Retry-After": str(retry_after_s)}
    return {"Connection": "close"} if status in (408, 413, 415) else {}
