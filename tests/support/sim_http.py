"""HTTP between simulated processes, as bytes and with production's proofs, and who may stand between them.

Owns what each process proves with and checks by: a life of a process has its own, as a real one has. Without a secret
nothing is proved and everything is taken.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from support.sim_network import NetworkError, SimNetwork, SimProcess

from kvcore.clock import Clock
from kvcore.errors import InvalidRequestError, KVFerryError, ProofError, error_from_code
from kvcore.trust.http_proof import (
    SIGNATURE,
    WANTED,
    Proof,
    ProvenReply,
    RequestProver,
    RequestVerifier,
    check_body,
    why_unproven,
)
from kvcore.trust.opening import ClusterTrust

App = Callable[[str, bytes], Awaitable[bytes]]
"""(path and query, body) -> body. Raises KVFerryError."""
Stream = Callable[[str, bytes], AsyncGenerator[bytes, None]]
"""The same, of an answer in frames."""


@dataclass(frozen=True)
class Request:
    """As it is sent. `host`: whose address its sender asked."""

    source: str
    host: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """As it is sent; of a stream its head."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


CUT = Reply(0)
"""The connection breaks."""


class Middle(Protocol):
    """Who sees what passes between two processes."""

    async def asked(self, request: Request) -> Request | Reply:
        """What goes on to the server, or what its sender gets in its place. May wait."""
        ...

    def answered(self, request: Request, reply: Reply) -> Reply:
        """What the sender gets."""
        ...

    def frames(self, request: Request, frame: bytes) -> list[bytes]:
        """What goes on in a frame's place."""
        ...


class Nobody:
    """A Middle that changes nothing."""

    async def asked(self, request: Request) -> Request | Reply:
        """See Middle."""
        return request

    def answered(self, request: Request, reply: Reply) -> Reply:
        """See Middle."""
        return reply

    def frames(self, request: Request, frame: bytes) -> list[bytes]:
        """See Middle."""
        return [frame]


class SimHttp:
    """Of all processes."""

    def __init__(self, network: SimNetwork, clock: Clock, trust: ClusterTrust) -> None:
        self.middle: Middle = Nobody()
        self._network, self._clock, self._trust = network, clock, trust
        self._servers: dict[SimProcess, tuple[App, Stream]] = {}
        self._provers: dict[SimProcess, RequestProver] = {}
        self._verifiers: dict[SimProcess, RequestVerifier] = {}
        self._taken: set[tuple[SimProcess, str]] = set()

    def serves(self, process: SimProcess, app: App, stream: Stream) -> None:
        """From now on, with what a process knows that has just begun."""
        self._servers[process] = app, stream
        if self._trust.secrets is not None:
            names = frozenset({_authority(process.name)})
            self._verifiers[process] = RequestVerifier(self._trust, self._clock, names)

    async def call(
        self, source: SimProcess, host: str, method: str, path: str, body: bytes, *, timeout_s: float, repeatable: bool
    ) -> bytes:
        """The answer's body. Raises NetworkError, and KVFerryError for what the server refused."""
        request, proof = self._request(source, host, method, path, body)

        async def serve(process: SimProcess) -> Reply:
            passed = await self.middle.asked(request)
            if isinstance(passed, Reply):
                return passed
            return self.middle.answered(request, await self.serve(process, passed))

        reply = await self._network.call(source, host, serve, timeout_s=timeout_s, repeatable=repeatable)
        proven = self._proven(source, host, proof, reply)
        if proven is not None:
            _checked(proven, reply)
        if reply.status >= 400:
            raise _error_in(reply)
        return reply.body

    async def frames(
        self, source: SimProcess, host: str, method: str, path: str, body: bytes, *, silence_s: float
    ) -> AsyncGenerator[bytes, None]:
        """The payloads of an answer's frames. Raises as `call` does."""
        request, proof = self._request(source, host, method, path, body)

        async def serve(process: SimProcess) -> AsyncGenerator[Reply | bytes, None]:
            passed = await self.middle.asked(request)
            if isinstance(passed, Reply):
                yield passed
                return
            async with aclosing(self._serve_stream(process, passed)) as items:
                async for item in items:
                    if isinstance(item, Reply):
                        yield self.middle.answered(request, item)
                        continue
                    for frame in self.middle.frames(request, item):
                        yield frame

        stream = self._network.stream(source, host, serve, silence_s)
        try:
            head = await anext(stream, None)
            if not isinstance(head, Reply):
                raise NetworkError("no head of an answer")
            proven = self._proven(source, host, proof, head)
            if head.status >= 400:
                if proven is not None:
                    _checked(proven, head)
                raise _error_in(head)
            async for frame in stream:
                if isinstance(frame, Reply):
                    raise NetworkError("a second head")
                try:
                    yield frame if proven is None else proven.seal.open(frame)
                except ProofError as error:
                    raise NetworkError(error.message) from error
        finally:
            await stream.aclose()

    async def serve(self, process: SimProcess, request: Request) -> Reply:
        """What the server on a process says to a request, from whomever."""
        verifier, proof = self._verifiers.get(process), None
        try:
            proof = self._checked_request(process, verifier, request)
            status, body = 200, await self._servers[process][0](request.path, request.body)
        except KVFerryError as error:
            status, body = _refusal(error)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            status, body = _refusal(InvalidRequestError(str(error)))
        return _reply(verifier, proof, status, body)

    async def _serve_stream(self, process: SimProcess, request: Request) -> AsyncGenerator[Reply | bytes, None]:
        verifier, proof = self._verifiers.get(process), None
        try:
            proof = self._checked_request(process, verifier, request)
            async with aclosing(self._servers[process][1](request.path, request.body)) as frames:
                first = await anext(frames, None)
                seal = verifier.seal(proof) if verifier is not None and proof is not None else None
                yield _reply(verifier, proof, 200, None)
                if first is not None:
                    yield first if seal is None else seal.seal(first)
                async for frame in frames:
                    yield frame if seal is None else seal.seal(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            yield _reply(verifier, proof, *_refusal(InvalidRequestError(str(error))))
        except KVFerryError as error:
            yield _reply(verifier, proof, *_refusal(error))

    def _request(
        self, source: SimProcess, host: str, method: str, path: str, body: bytes
    ) -> tuple[Request, Proof | None]:
        if self._trust.secrets is None:
            return Request(source.name, host, method, path, {}, body), None
        prover = self._provers.setdefault(source, RequestProver(self._trust, self._clock))
        proof = prover.prove(method, _authority(host), path, body)
        return Request(source.name, host, method, path, dict(proof.headers), body), proof

    def _checked_request(self, process: SimProcess, verifier: RequestVerifier | None, request: Request) -> Proof | None:
        if verifier is None:
            return None
        headers = {"Host": _authority(request.host), **request.headers}
        proof = verifier.check(request.method, request.path, headers)
        check_body(proof, request.body)
        if request.method != "GET":
            assert (process, headers[SIGNATURE]) not in self._taken, f"taken twice: {request}"
            self._taken.add((process, headers[SIGNATURE]))
        return proof

    def _proven(self, source: SimProcess, host: str, proof: Proof | None, reply: Reply) -> ProvenReply | None:
        if reply is CUT:
            raise NetworkError("cut")
        if proof is None:
            return None
        proven = self._provers[source].proven_reply(proof, reply.status, reply.headers)
        if proven is None:
            self._network.trace("unproven", source.name, host, reply.status)
            raise NetworkError(why_unproven(host, reply.status, reply.headers, reply.body))
        return proven


def _authority(host: str) -> str:
    return f"{host}:1"


def _checked(proven: ProvenReply, reply: Reply) -> None:
    try:
        proven.check(reply.body)
    except ProofError as error:
        raise NetworkError(error.message) from error


def _reply(verifier: RequestVerifier | None, proof: Proof | None, status: int, body: bytes | None) -> Reply:
    headers = {}
    if proof is not None and verifier is not None:
        headers = dict(verifier.reply_headers(proof, status, body))
    elif verifier is not None:
        headers = {WANTED: verifier.wanted}
    return Reply(status, headers, body or b"")


def _refusal(error: KVFerryError) -> tuple[int, bytes]:
    return error.http_status, msgspec.msgpack.encode({"code": error.code, "message": error.message})


def _error_in(reply: Reply) -> KVFerryError:
    try:
        detail = msgspec.msgpack.decode(reply.body, type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        detail = {}
    return error_from_code(detail.get("code", ""), detail.get("message", f"status {reply.status}"))
