"""How the node's control API answers: bodies, errors, and only to the cluster's own processes where it has a secret."""

import logging

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from kvcore.errors import CancelledByPeerError, InvalidRequestError, KVFerryError, ProofError
from kvcore.process.aiohttp_gate import check_place
from kvcore.process.certified_app import NO_CERTIFICATE
from kvcore.process.proven_app import OPEN_PATHS
from kvcore.trust.certificates import peer_names
from kvcore.trust.http_proof import INPUT, WANTED, FrameSeal, Proof, RequestVerifier, check_body
from nodeapi.frames import pack_frame

MSGPACK = "application/msgpack"
_logger = logging.getLogger("kvnode")
_PROOF: web.RequestKey[Proof] = web.RequestKey("proof", Proof)
_SEAL: web.RequestKey[FrameSeal] = web.RequestKey("seal", FrameSeal)


class CertifiedCalls:
    """Of one application whose listener asks for certificates of the cluster: refuses whoever shows none."""

    def add_to(self, app: web.Application) -> None:
        """The middleware belongs inside of what makes error bodies."""
        app.middlewares.append(self._check)

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_PATHS and peer_names(request.transport) is None:
            raise ProofError(NO_CERTIFICATE)
        return await handler(request)


class ProvenCalls:
    """Of one application. The middleware belongs inside of what makes error bodies."""

    def __init__(self, verifier: RequestVerifier) -> None:
        self._verifier = verifier

    def add_to(self, app: web.Application) -> None:
        """Refuse what is not proved, and prove the answers."""
        app.middlewares.append(self._check)
        app.on_response_prepare.append(self._prove)

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_PATHS or INPUT in request.headers:
            request[_PROOF] = self._verifier.check(request.method, request.raw_path, request.headers)
        return await handler(request)

    async def _prove(self, request: web.Request, response: web.StreamResponse) -> None:
        proof = request.get(_PROOF)
        if proof is not None:
            body: bytes | None = None
            if isinstance(response, web.Response):
                whole = response.body or b""
                assert isinstance(whole, bytes), "an answer is made whole, or is a stream of frames"
                body = whole
            else:
                request[_SEAL] = self._verifier.seal(proof)
            response.headers.update(self._verifier.reply_headers(proof, response.status, body))
        elif response.status == 401:
            response.headers[WANTED] = self._verifier.wanted


def check_read(request: web.Request, body: bytes) -> bytes:
    """The body, if it is the one that was proved, or none was. Raises ProofError."""
    proof = request.get(_PROOF)
    if proof is not None:
        check_body(proof, body)
    return body


def frame_around(request: web.Request, payload: bytes) -> bytes:
    """The next frame of an answer that is a stream of them, once its head has gone; sealed where it was proved."""
    seal = request.get(_SEAL)
    return pack_frame(payload if seal is None else seal.seal(payload))


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The request boundary: every failure becomes one error body, ours with its status, a bug with 500 and a log."""
    try:
        return check_place(request) or await handler(request)
    except KVFerryError as error:
        return error_answer(request, error)
    except web.HTTPException as error:
        refused = InvalidRequestError(f"{request.method} {request.path}: {error.reason}")
        return error_answer(request, refused, status=error.status)
    except ConnectionError:  # its writing fails too, which aiohttp takes quietly; what we raise it logs as an error
        return error_answer(request, CancelledByPeerError("the client has gone"))
    except Exception:
        _logger.exception("control_request_failed method=%s path=%s", request.method, request.path)
        return error_answer(request, KVFerryError("internal error of the node; its log says more"))


def error_answer(request: web.Request, error: KVFerryError, status: int | None = None) -> web.Response:
    """In msgpack for our own clients, which ask for it; a person with curl or a browser reads JSON."""
    body = {"error": {"code": error.code, "message": error.message, "retryable": error.retryable}}
    ours = MSGPACK in request.headers.get("Accept", "")
    return web.Response(
        status=status or error.http_status,
        body=msgspec.msgpack.encode(body) if ours else msgspec.json.encode(body),
        content_type=MSGPACK if ours else "application/json",
        headers={"Retry-After": "1"} if error.http_status == 503 else None,
    )


def msgpack_answer(value: msgspec.Struct) -> web.Response:
    """Of a call that went well."""
    return web.Response(body=msgspec.msgpack.encode(value), content_type=MSGPACK)
