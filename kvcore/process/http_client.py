"""Sessions of our HTTP clients. None follows a redirect: it would send a body, with tokens or a key, to whom the answer
names, and no server of a cluster has reason for one. Where the cluster's processes have certificates they show them;
else, with a secret, each request proves that it comes from the cluster.
"""

import ssl
from typing import Any

import aiohttp

from kvcore.clock import SystemClock
from kvcore.errors import ProofError
from kvcore.trust.http_proof import (
    MAX_PROVEN_BYTES,
    MAX_SAID_BYTES,
    WANTED,
    FrameSeal,
    Proof,
    RequestProver,
    why_unproven,
)
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.tls import pinned_context


class RedirectedError(aiohttp.ClientError):
    """A server answered with a redirect."""


class UnprovenReplyError(aiohttp.ClientError):
    """Who answered has not proved that it knows the cluster's secret. Also a refusal: whoever sits between us and the
    server could have made it up, so it says no more than that this server cannot be asked now."""


class ProofRefusedError(UnprovenReplyError):
    """Our proof is not taken. Whether a process of the cluster says so is not known."""


def http_session(*, trust: ClusterTrust = OPEN, **options: Any) -> aiohttp.ClientSession:
    """A session with the cluster's processes, but for its router: aiohttp's with these options, whose calls raise
    RedirectedError where the answer is a redirect, and with a secret UnprovenReplyError where it comes from a stranger.
    Made inside the loop that uses it. Bodies are bytes. A connector among the options has `internal_ssl` as its ssl."""
    if "connector" not in options:
        options["connector"] = aiohttp.TCPConnector(ssl=internal_ssl(trust))
    return _session(trust if trust.proves_http else OPEN, options)


def router_session(*, trust: ClusterTrust = OPEN, **options: Any) -> aiohttp.ClientSession:
    """The same with the cluster's router, which shows its certificate to all, and asks for none."""
    if trust.source.router_cert and "connector" not in options:
        options["connector"] = aiohttp.TCPConnector(ssl=pinned_context(trust.source.router_cert))
    return _session(trust, options)


def operators_session(*, trust: ClusterTrust = OPEN, **options: Any) -> aiohttp.ClientSession:
    """The same with where the cluster's router takes orders: its operators' port, by certificates if there are some."""
    if trust.source.admin_port and trust.certificate is not None:
        return http_session(trust=trust, **options)
    return router_session(trust=trust, **options)


def processes_session(*, trust: ClusterTrust = OPEN, **options: Any) -> aiohttp.ClientSession:
    """The same with the ports that a router's processes have of their own: by certificates and by proofs, whatever
    there is of both, as what is asked there are operators' questions."""
    if trust.certificate is not None:
        return _session(trust, {"connector": aiohttp.TCPConnector(ssl=internal_ssl(trust)), **options})
    return router_session(trust=trust, **options)


def internal_ssl(trust: ClusterTrust) -> ssl.SSLContext | bool:
    """By what a connector of `http_session` knows a server, and shows who we are: `ssl` of aiohttp's TCPConnector."""
    return True if trust.certificate is None else trust.certificate.client


def _session(trust: ClusterTrust, options: dict[str, Any]) -> aiohttp.ClientSession:
    known: tuple[aiohttp.ClientMiddlewareType, ...] = ()
    if trust.secrets is not None:
        known = (_Proving(RequestProver(trust, SystemClock())).send,)
        options |= {"response_class": _ProvenResponse, "auto_decompress": False}
    return aiohttp.ClientSession(middlewares=(_refuse_redirects, *known), **options)


async def _refuse_redirects(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    response = await send(request)
    if 300 <= response.status < 400:
        location = response.headers.get("Location", "nowhere")
        response.close()
        raise RedirectedError(
            f"{request.url} answered {response.status}, a redirect to {location}, which is not followed: "
            "name the server itself"
        )
    return response


class _ProvenResponse(aiohttp.ClientResponse):
    seal: FrameSeal | None = None
    is_proven_stream = False
    """Its head is proved, and each frame by itself: only who opens the frames may believe it."""

    async def read(self) -> bytes:
        """As of its class. Raises UnprovenReplyError for a stream: as a whole nothing proves it."""
        if self.is_proven_stream:
            self.close()
            raise UnprovenReplyError(f"{self.url.origin()} answered with a stream, where a whole answer is expected")
        return await super().read()

    async def read_at_most(self, most: int) -> bytes:
        """As `read`, which gives the same from then on. Raises UnprovenReplyError for a longer body: whoever sits
        between us and the server can send any behind the head that it proved."""
        parts, size = list[bytes](), 0
        async for part in self.content.iter_any():
            size += len(part)
            if size > most:
                self.close()
                raise UnprovenReplyError(f"{self.url.origin()} answered more than {most} bytes")
            parts.append(part)
        self._body = b"".join(parts)
        return await self.read()


def frame_seal(response: aiohttp.ClientResponse) -> FrameSeal | None:
    """What opens the frames of an answer that is a stream of them; None: nothing was proved."""
    return response.seal if isinstance(response, _ProvenResponse) else None


class _Proving:
    """Proves the requests of one session."""

    def __init__(self, prover: RequestProver) -> None:
        self._prover = prover

    async def send(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        """A refusal that asks for another secret of ours is no answer: the request had no effect and is made again."""
        proof = await self._prove(request)
        response = await send(request)
        if response.status == 401:
            authority = request.headers["Host"]
            if self._prover.learn(authority, proof, response.headers.get(WANTED)):
                response.release()
                proof = await self._prove(request)
                response = await send(request)
        reply = self._prover.proven_reply(proof, response.status, response.headers)
        if reply is None:
            beginning = await response.content.read(MAX_SAID_BYTES) if response.status >= 400 else b""
            response.close()
            server, status = str(request.url.origin()), response.status
            kind = ProofRefusedError if status == 401 else UnprovenReplyError
            raise kind(why_unproven(server, status, response.headers, beginning))
        assert isinstance(response, _ProvenResponse), "of a session that proves"
        response.seal, response.is_proven_stream = reply.seal, reply.digest is None
        if reply.digest is not None:
            try:
                reply.check(await response.read_at_most(MAX_PROVEN_BYTES))
            except ProofError as error:
                raise UnprovenReplyError(f"{request.url.origin()}: {error.message}") from error
        return response

    async def _prove(self, request: aiohttp.ClientRequest) -> Proof:
        body = await request.body.as_bytes() if request.body else b""
        proof = self._prover.prove(request.method, request.headers["Host"], request.url.raw_path_qs, body)
        request.headers.update(proof.headers)
        return proof
