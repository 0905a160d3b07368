"""An ASGI application of which only the cluster's own processes get an answer."""

import hashlib
from collections.abc import Callable

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcore.errors import ProofError
from kvcore.trust.http_proof import WANTED, Proof, RequestVerifier, check_digest, digest_text

OPEN_PATHS = frozenset({"/health", "/metrics"})
"""What orchestrators and Prometheus ask, which have no secret: they say how we are, and nothing of prompts."""

FRAME_SEAL = "kvferry.frame_seal"
"""In the scope of a proved request: what seals each frame of an answer that is a stream of them."""

Needs = Callable[[Scope], bool]


def all_but_open_paths(scope: Scope) -> bool:
    """Whether a request needs a proof, of a server whose clients are all ours."""
    return scope["path"] not in OPEN_PATHS


class ProvenApp:
    """Passes a request on once its head is proved; one that needs no proof also without. Its body is checked while the
    application reads it: `receive` raises ProofError at the end of another one."""

    def __init__(self, app: ASGIApp, verifier: RequestVerifier, needs: Needs = all_but_open_paths) -> None:
        self._app = app
        self._verifier = verifier
        self._needs = needs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or not (self._needs(scope) or carries_proof(scope)):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").title(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            proof = self._verifier.check(scope["method"], _target(scope), headers)
        except ProofError as error:
            await refuse(error, scope, send, wanted=self._verifier.wanted)
            return

        start: Message | None = None

        async def send_proved(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message  # until its body is known, which is proved with it
                return
            if start is not None and message["type"] == "http.response.body":
                whole = None if message.get("more_body", False) else message.get("body", b"")
                made = self._verifier.reply_headers(proof, start["status"], whole)
                own = [(name.encode(), value.encode()) for name, value in made]
                head, start = {**start, "headers": [*start.get("headers", ()), *own]}, None
                await send(head)
            await send(message)

        await self._app({**scope, FRAME_SEAL: self._verifier.seal(proof)}, _checked(receive, proof), send_proved)


async def refuse(error: ProofError, scope: Scope, send: Send, wanted: str = "") -> None:
    """Answers in the form that is asked for. `wanted`: the secrets by which the server would know the sender."""
    detail = {"message": error.message, "type": "invalid_request_error", "param": None, "code": error.code}
    binary = any(name == b"accept" and b"msgpack" in value for name, value in scope["headers"])
    body = (msgspec.msgpack if binary else msgspec.json).encode({"error": {**detail, "retryable": error.retryable}})
    kind = b"application/msgpack" if binary else b"application/json"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    if wanted:
        headers.append((WANTED.lower().encode(), wanted.encode()))
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def carries_proof(scope: Scope) -> bool:
    """Whether a request has a signature of the cluster's own kind, right or wrong; others' proxies make others."""
    return any(name == b"signature-input" and value.startswith(b"kvferry=") for name, value in scope["headers"])


def _target(scope: Scope) -> str:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return (path + b"?" + query if query else path).decode("latin-1")


def _checked(receive: Receive, proof: Proof) -> Receive:
    sha256 = hashlib.sha256()

    async def receive_checked() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            sha256.update(message.get("body", b""))
            if not message.get("more_body", False):
                check_digest(proof, digest_text(sha256.digest()))
        return message

    return receive_checked
