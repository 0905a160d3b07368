"""Somebody who owns the network of one simulated node, and has not the cluster's secret.

All HTTP messages to and from that node, and all transfers between it and others, pass through its hands: it drops,
delays, replays, reorders, changes and makes up what it likes, answers in others' place, and leads transfers to memory
of its own. It keeps what it saw.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from support.chunk_attacks import ATTACKS
from support.sim_http import CUT, Reply, Request, SimHttp
from support.sim_network import SimNetwork

from kvcore.errors import TransferError, TransferProofError
from kvcore.trust.http_proof import DIGEST, INPUT, SIGNATURE
from kvcore.trust.opening import ClusterTrust
from kvcore.types import NodeInfo, Role, Segment
from kvstore.chunk_format import HEADER_BYTES, parse
from metadata_server.cache_messages import ReleaseWriterRequest
from metadata_server.messages import (
    HeartbeatRequest,
    LeaveRequest,
    MatchRequest,
    RegisterRequest,
    ReplicaIds,
)
from nodeapi.messages import FinishReason, TokenDelta
from transfer.base import Direction, TransferEngine, TransferOp
from transfer.greeting import InitiatorGreeting, TargetGreeting, greeting_keys


class NetworkOwner:
    """`victim`: the node. `peaceful` from some time on: then it passes everything on."""

    def __init__(self, network: SimNetwork, http: SimHttp, trust: ClusterTrust, victim: str, seed: int) -> None:
        self.victim, self.peaceful = victim, False
        self._network, self._http, self._trust = network, http, trust
        self._dice = random.Random(f"owner {seed}")
        self._messages = self._dice.choice([0.0, 0.02, 0.1, 0.3])
        """Of these so many are not passed on as they are; of frames fewer. Whoever does little is not soon noticed."""
        self._bytes = self._dice.choice([0.1, 0.5])
        """The same of transfers."""
        self._requests: deque[Request] = deque(maxlen=64)
        self._replies: deque[Reply] = deque(maxlen=64)
        self._frames: deque[bytes] = deque(maxlen=64)
        self._chunks: deque[bytes] = deque(maxlen=64)
        http.middle = self

    async def run(self) -> None:
        """Until cancelled: says things of its own accord."""
        while True:
            await asyncio.sleep(self._dice.uniform(0.0, 0.05))
            host = self._dice.choice(list(self._network.hosts))
            process = self._network.hosts[host]
            if process.alive and host != "router":
                self._inject(host)

    # --- HTTP ---

    async def asked(self, request: Request) -> Request | Reply:
        """See Middle."""
        if not self._owns(request.source, request.host):
            return request
        self._requests.append(request)
        match self._choice("drop", "late", "change", "other_proof", "answer", "replay", often=self._messages):
            case "drop":
                if self._dice.random() < 0.3:
                    self._later(request, request.host)
                return CUT
            case "late":
                await asyncio.sleep(self._dice.uniform(0.0, 2.0))
            case "change":
                return self._changed(request)
            case "other_proof":
                return replace(request, headers=self._dice.choice(self._requests).headers)
            case "answer":
                return self._made_up(request)
            case "replay":
                for _ in range(self._dice.randrange(1, 4)):
                    self._later(self._dice.choice(self._requests), request.host)
        return request

    def answered(self, request: Request, reply: Reply) -> Reply:
        """See Middle."""
        if not self._owns(request.source, request.host):
            return reply
        self._replies.append(reply)
        match self._choice(
            "cut", "change_reply", "other_reply", "other_status", "without_digest", often=self._messages
        ):
            case "cut":
                return CUT
            case "change_reply":
                return replace(reply, body=self._spoilt(reply.body))
            case "other_reply":
                return self._dice.choice(self._replies)
            case "other_status":
                return replace(reply, status=self._dice.choice([200, 204, 400, 401, 404, 503]))
            case "without_digest":
                return replace(reply, headers={name: reply.headers.get(name, "") for name in (INPUT, SIGNATURE)})
        return reply

    def frames(self, request: Request, frame: bytes) -> list[bytes]:
        """See Middle."""
        if not self._owns(request.source, request.host):
            return [frame]
        self._frames.append(frame)
        other = self._dice.choice(self._frames)
        match self._choice(
            "lose_frame", "twice", "change_frame", "other_frame", "own_frame", often=0.5 * self._messages
        ):
            case "lose_frame":
                return []
            case "twice":
                return [frame, frame]
            case "change_frame":
                return [self._spoilt(frame)]
            case "other_frame":
                return [other]
            case "own_frame":
                delta = TokenDelta(token_ids=[self._dice.randrange(300)], finish_reason=FinishReason.LENGTH)
                return [msgspec.msgpack.encode(delta), frame]
        return [frame]

    def _changed(self, request: Request) -> Request:
        dice = self._dice
        headers = dict(request.headers)
        match dice.choice(["body", "path", "method", "digest", "input"]):
            case "body":
                return replace(request, body=self._spoilt(request.body))
            case "path":
                return replace(request, path=dice.choice(self._requests).path)
            case "method":
                return replace(request, method=dice.choice(["GET", "POST", "DELETE"]))
            case "digest":
                headers[DIGEST] = dice.choice(self._requests).headers.get(DIGEST, "")
            case _:
                headers[INPUT] = headers.get(INPUT, "").replace("1", "2")
        return replace(request, headers=headers)

    def _made_up(self, request: Request) -> Reply:
        """In the server's place: success, an old answer, or an error that would steer who asked."""
        dice = self._dice
        old = dice.choice(self._replies) if self._replies else Reply(200)
        codes = ["not_leader", "node_refused", "wrong_role", "invalid_request", "engine_died", "proof_refused"]
        said = msgspec.msgpack.encode({"code": dice.choice(codes), "message": "so it is", "leader": "http://6.6.6.6:1"})
        own = Reply(dice.choice([400, 401, 404, 409, 429, 503]), {}, said)
        delta = Reply(200, {}, msgspec.msgpack.encode(TokenDelta(token_ids=[1], finish_reason=FinishReason.LENGTH)))
        return dice.choice([old, replace(old, headers=dict(request.headers)), own, delta])

    def _inject(self, host: str) -> None:
        """A request that nobody sent: an old one, here or to another server, or its own under a heard proof."""
        dice, victim = self._dice, self.victim
        heard = dice.choice(self._requests) if self._requests else Request("", host, "GET", "/v1/info", {}, b"")
        info = NodeInfo(
            id=victim, role=Role.DECODER, control_url="http://owned:1", incarnation=1 << 53, cluster="sim", model="m"
        )
        ids = [dice.randrange(1, 200) for _ in range(8)]
        me: dict[str, Any] = {"node_id": victim, "incarnation": 1 << 53}
        own: list[tuple[str, msgspec.Struct]] = [
            ("/v1/nodes/register", RegisterRequest(node=info, segments=[], ttl_s=60.0)),
            ("/v1/nodes/heartbeat", HeartbeatRequest(**me)),
            ("/v1/nodes/leave", LeaveRequest(**me)),
            ("/v1/nodes/release_writer", ReleaseWriterRequest(**me)),
            ("/v1/objects/commit", ReplicaIds(replica_ids=ids, **me)),
            ("/v1/objects/abort", ReplicaIds(replica_ids=ids, **me)),
            ("/v1/objects/match", MatchRequest(keys=[], lease_s=60.0)),
        ]
        path, body = dice.choice(own)
        made = replace(heard, method="POST", path=path, host=host, body=msgspec.msgpack.encode(body))
        self._later(dice.choice([heard, replace(heard, host=host), made]), host)

    def _later(self, request: Request, host: str) -> None:
        async def send() -> None:
            await asyncio.sleep(self._dice.choice([0.0, 0.05, 0.5, 5.0]) * self._dice.random())
            process = self._network.hosts.get(host)
            if process is not None and process.alive and not self.peaceful:
                reply = await self._http.serve(process, request)
                self._network.trace("injected", host, request.path, reply.status)

        process = self._network.hosts[host]
        if process.alive and request.path != "/v1/generate" and "events" not in request.path:
            process.spawn(send())

    # --- transfers ---

    def around(self, engine: TransferEngine, source: str) -> TransferEngine:
        """The same engine of a process on the host `source`, whose bytes pass through its hands."""
        return _OwnedTransfer(self, engine, source)

    def greeting_error(self, source: str, segment: Segment) -> TransferError | None:
        """The greeting of a new connection, as production's ends make it; None: both have been convinced."""
        keys, nonce = greeting_keys(self._trust), self._dice.randbytes
        if not keys:
            return None
        mine = InitiatorGreeting(keys, "inproc", segment.id, nonce)
        theirs = TargetGreeting(keys, "inproc", nonce)
        try:
            asked, challenge = theirs.challenge(self._passed(mine.hello()))
            proof = mine.answer(self._passed(challenge))
            theirs.check(self._passed(proof))
        except TransferProofError as error:
            self._network.trace("greeting_refused", source, segment.id)
            return error
        return None if asked == segment.id else TransferProofError("another segment")

    def _passed(self, message: bytes) -> bytes:
        spoils = not self.peaceful and self._dice.random() < self._bytes / 5
        return self._spoilt(message) if spoils else message

    def reads(self, there: bytes) -> bytes:
        """What a reader of a segment gets for these bytes."""
        what = self._choice("data_change", "data_other", "data_forged", often=self._bytes)
        others = [one for one in self._chunks if len(one) == len(there)]
        header = parse(there) if len(there) > HEADER_BYTES else None
        if header is not None and len(there) == HEADER_BYTES + header.payload_length:
            self._chunks.append(there)
        else:
            header = None
        if what == "data_change":
            return self._spoilt(there)
        if what == "data_other" and others:
            return self._dice.choice(others)
        if what == "data_forged" and header is not None:
            other = self._dice.choice(others) if others else there
            return ATTACKS[self._dice.choice(list(ATTACKS))].change(there, other)
        return there

    def owns(self, source: str, segment: Segment) -> bool:
        """Whether transfers between these are in its hands."""
        return not self.peaceful and source != segment.node_id and self._owns(source, segment.node_id)

    def leads_away(self) -> bool:
        """Whether a write goes to memory of its own."""
        return self._choice("redirected", often=0.3 * self._bytes) == "redirected"

    # --- chance ---

    def _owns(self, source: str, host: str) -> bool:
        return not self.peaceful and self.victim in (source, host)

    def _choice(self, *deeds: str, often: float) -> str:
        """One of them, which is counted; mostly none."""
        if self._dice.random() >= often:
            return ""
        deed = self._dice.choice(deeds)
        self._network.trace(f"owner_{deed}")
        return deed

    def _spoilt(self, data: bytes) -> bytes:
        if not data:
            return b"\x80"
        at = self._dice.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << self._dice.randrange(8))]) + data[at + 1 :]


class _OwnedTransfer:
    """One process's engine."""

    def __init__(self, owner: NetworkOwner, engine: TransferEngine, source: str) -> None:
        self._owner, self._engine, self._source = owner, engine, source
        self._greeted: set[str] = set()
        self.kind = engine.kind
        self.reaches: Callable[[Segment], bool] = engine.reaches
        self.register: Callable[[memoryview], None] = engine.register

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """See TransferEngine."""
        return await self._each("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """See TransferEngine."""
        return await self._each("read", ops, timeout_s)

    async def aclose(self) -> None:
        """See TransferEngine."""
        await self._engine.aclose()

    async def _each(
        self, direction: Direction, ops: Sequence[TransferOp], timeout_s: float
    ) -> list[TransferError | None]:
        return [await self._one(direction, op, timeout_s) for op in ops]

    async def _one(self, direction: Direction, op: TransferOp, timeout_s: float) -> TransferError | None:
        engine, segment = self._engine, op.segment
        work = engine.write if direction == "write" else engine.read
        if not self._owner.owns(self._source, segment):
            return (await work([op], timeout_s))[0]
        if segment.id not in self._greeted:
            if (error := self._owner.greeting_error(self._source, segment)) is not None:
                return error
            self._greeted.add(segment.id)
        if direction == "write":
            return None if self._owner.leads_away() else (await self._changed_write(op, timeout_s))
        there = bytearray(op.num_bytes)
        error = (await engine.read([replace(op, buffers=[memoryview(there)], on_part=None)], timeout_s))[0]
        if error is None:
            _give(op, self._owner.reads(bytes(there)))
        return error

    async def _changed_write(self, op: TransferOp, timeout_s: float) -> TransferError | None:
        said = b"".join(op.buffers)
        sent = memoryview(bytearray(self._owner.reads(said)))
        if op.on_part is not None:
            op.on_part(memoryview(said))
        return (await self._engine.write([replace(op, buffers=[sent], on_part=None)], timeout_s))[0]


def _give(op: TransferOp, data: bytes) -> None:
    at = 0
    for view in op.buffers:
        flat = view.cast("B") if view.nbytes and (view.format != "B" or view.ndim != 1) else view
        flat[:] = data[at : at + view.nbytes]
        if op.on_part is not None and view.nbytes:
            op.on_part(flat)
        at += view.nbytes
