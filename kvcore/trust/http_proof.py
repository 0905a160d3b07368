"""Proofs of HTTP requests between the processes of a cluster: RFC 9421 signatures by HMAC-SHA-256, RFC 9530 digests.

A fixed profile of them, made by hand: a library for all of RFC 9421 takes 0.2 ms to check one, and the router has 0.03
ms a request. It covers method, authority, path, query and body, the time, and a number that its sender uses once. An
answer is proved with its body, or, where that is a stream of frames, frame by frame. Pure but for the clock.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets as random
from binascii import b2a_base64
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from kvcore.clock import Clock
from kvcore.errors import ProofError
from kvcore.trust.keys import ClusterKey, KeyLabel, MacKey
from kvcore.trust.limits import ProofLimits
from kvcore.trust.opening import ClusterTrust
from kvcore.trust.replays import SeenRequests
from kvcore.trust.secrets import Secrets

DIGEST, INPUT, SIGNATURE, WANTED = "Content-Digest", "Signature-Input", "Signature", "Accept-Signature"
"""The headers. The last one is a refusal's, and names the secrets that the server knows."""

SEAL_BYTES = 16
"""Behind each frame's payload, and counted by its length."""
MAX_PROVEN_BYTES = 256 << 20
"""Of a body that is read before it is known to be the one that was proved."""
MAX_SAID_BYTES = 1024
"""Of a refusal that is not proven, told in an error."""

_COVERED = '("@method" "@authority" "@path" "@query" "content-digest")'
_INPUT = re.compile(
    r'kvferry=(\("@method" "@authority" "@path" "@query" "content-digest"\);created=(\d{1,11});'
    r'nonce="([A-Za-z0-9+/]{22}==)";keyid="([0-9a-f]{16})";alg="hmac-sha256";tag="kvferry(?::([0-9a-f]{24}))?")'
)
_WHOLE_COVERED = '("@status" "content-digest" "signature";req;key="kvferry")'
_STREAM_COVERED = '("@status" "signature";req;key="kvferry")'
_KEY_ID = re.compile(r'keyid="([0-9a-f]{16})"')
_WANTED_TAG = re.compile(r'tag="(kvferry:[0-9a-f]{24})"')
_LIFE_BYTES = 12
_SENDER_BYTES, _NUMBER_BYTES, _PART_BYTES = 8, 5, 3
_PARTS = 1 << (8 * _PART_BYTES)
"""Of a second: `created` has whole ones, and the nonce ends with the rest."""


class Proof(NamedTuple):
    """One request's."""

    key: ClusterKey
    digest: str
    """Of the body, as its header has it."""
    signature: str
    """As its header has it."""
    params: str = ""
    """Of the signature, as they are sent; empty on the side that checks."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What is sent."""
        return ((DIGEST, self.digest), (INPUT, f"kvferry={self.params}"), (SIGNATURE, self.signature))

    @property
    def lines(self) -> str:
        """The same as they are on the wire."""
        return f"{DIGEST}: {self.digest}\r\n{INPUT}: kvferry={self.params}\r\n{SIGNATURE}: {self.signature}\r\n"


class RequestProver:
    """Proves requests of one process, and checks that who answers knows the secret, too."""

    def __init__(self, trust: ClusterTrust, clock: Clock) -> None:
        assert trust.secrets is not None, "without a secret there is nothing to prove"
        self._secrets = trust.secrets
        self._context = trust.cluster.encode()
        self._clock = clock
        self._sender = random.token_bytes(_SENDER_BYTES)
        self._number = 0
        self._wanted: dict[str, bytes] = {}
        """By authority, where it knows another of our secrets than the newest."""
        self._tags: dict[str, str] = {}
        """By authority, where it has asked for one: which start of it our requests are for."""

    def prove(self, method: str, authority: str, target: str, body: bytes) -> Proof:
        """`target`: path and query as they are sent. `authority`: the Host header."""
        key = self._key_for(authority)
        self._number += 1
        created, part = divmod(int(self._clock.wall() * _PARTS), _PARTS)
        number = self._number.to_bytes(_NUMBER_BYTES, "big")
        nonce = _base64(self._sender + number + part.to_bytes(_PART_BYTES, "big"))
        digest = digest_of(body)
        tag = self._tags.get(authority, "kvferry")
        params = f'{_COVERED};created={created};nonce="{nonce}";keyid="{key.name}";alg="hmac-sha256";tag="{tag}"'
        signature = _sign(key, self._context, _base(method, authority, target, digest, params))
        return Proof(key, digest, signature, params)

    def learn(self, authority: str, refused: Proof, wanted: str | None) -> bool:
        """A server refused; `wanted`: its Accept-Signature. Whether it knows another of our secrets, or wants to hear
        which start of it the request is for: prove it anew."""
        tag = _WANTED_TAG.search(wanted or "")
        if news := tag is not None and f'tag="{tag[1]}"' not in refused.params:
            self._tags[authority] = tag[1]
        named = [bytes.fromhex(key_id) for key_id in _KEY_ID.findall(wanted or "")]
        ours = [key_id for key_id in named if self._secrets.find(key_id) is not None]
        if not ours or refused.key.id in named:
            return news and bool(ours)
        self._wanted[authority] = ours[0]
        return True

    def proven_reply(self, proof: Proof, status: int, headers: Mapping[str, str]) -> "ProvenReply | None":
        """What the head of an answer proves; None: not even that it comes from one who knows the secret and got this
        request."""
        digest = headers.get(DIGEST)
        params = headers.get(INPUT, "").removeprefix("kvferry=")
        wanted = _sign_reply(proof, self._context, status, digest)
        if params != _reply_params(proof.key.name, digest is None) or not hmac.compare_digest(
            headers.get(SIGNATURE, "").encode(), wanted.encode()
        ):
            return None
        return ProvenReply(digest, FrameSeal(proof, self._context))

    def _key_for(self, authority: str) -> ClusterKey:
        wanted = self._wanted.get(authority)
        if wanted is None:
            return self._secrets.newest
        return self._secrets.find(wanted) or self._secrets.newest


class RequestVerifier:
    """Checks the proofs of the requests that one server gets.

    What came already is not known of the server's earlier starts: a request is taken that says it was made for this
    start, by a random name that nobody could know before it, or that was made later by its sender's clock. A sender
    whose clock is behind is refused once, told that name, and asks again.
    """

    def __init__(
        self,
        trust: ClusterTrust,
        clock: Clock,
        authorities: frozenset[str] | None,
        limits: ProofLimits = ProofLimits(),
    ) -> None:
        """`authorities`: what this server is called in Host (`host:port` in lower case); None: anything."""
        assert trust.secrets is not None, "without a secret there is nothing to check"
        self._secrets: Secrets = trust.secrets
        self._context = trust.cluster.encode()
        self._clock = clock
        self._authorities = authorities
        self._limits = limits
        self._seen = SeenRequests(2 * limits.skew_s, limits)
        self._began = int(clock.wall() * _PARTS)
        self._life = random.token_hex(_LIFE_BYTES)

    def __repr__(self) -> str:
        return f"<RequestVerifier {self._secrets!r}, {self._seen!r}>"

    @property
    def wanted(self) -> str:
        """The Accept-Signature of a refusal."""
        keys = zip(("kvferry", "kvferry-before"), self._secrets.accepted, strict=False)
        asked = f';tag="kvferry:{self._life}"'
        return ", ".join(f'{label}={_COVERED};keyid="{key.id.hex()}"{asked}' for label, key in keys)

    def check(self, method: str, target: str, headers: Mapping[str, str]) -> Proof:
        """The proof of a request's head; its body is checked by `check_body`. Raises ProofError. `target`: path and
        query as they were sent."""
        params, created, nonce, key, life = self._parsed(headers)
        authority, digest = headers.get("Host", "").lower(), headers.get(DIGEST, "")
        signature = headers.get(SIGNATURE, "")
        wanted = _sign(key, self._context, _base(method, authority, target, digest, params))
        if not hmac.compare_digest(signature.encode(), wanted.encode()):
            raise ProofError("the request's proof is wrong: it was changed on its way, or is of another cluster")
        if self._authorities is not None and authority not in self._authorities:
            raise ProofError(f"the request was made for {authority[:200]}, and this server is another one")
        self._check_time(created)
        if method not in ("GET", "HEAD"):
            sender, rest = nonce[:_SENDER_BYTES], int.from_bytes(nonce[_SENDER_BYTES:], "big")
            number, part = divmod(rest, _PARTS)
            if life != self._life and created * _PARTS + part < self._began:
                raise ProofError("the request was made before this server started: make it again")
            if not self._seen.is_new(sender, number, self._clock.now()):
                raise ProofError("the request came before, or too many later ones did: make it again")
        return Proof(key, digest, signature)

    def reply_headers(self, proof: Proof, status: int, body: bytes | None) -> tuple[tuple[str, str], ...]:
        """What an answer carries, by which its reader knows that we know the secret. `body`: all of it; None: it is a
        stream, of which each frame is sealed by `seal`."""
        digest = None if body is None else digest_of(body)
        own = (
            (INPUT, f"kvferry={_reply_params(proof.key.name, digest is None)}"),
            (SIGNATURE, _sign_reply(proof, self._context, status, digest)),
        )
        return own if digest is None else ((DIGEST, digest), *own)

    def seal(self, proof: Proof) -> "FrameSeal":
        """Of the answer's frames."""
        return FrameSeal(proof, self._context)

    def _parsed(self, headers: Mapping[str, str]) -> tuple[str, int, bytes, ClusterKey, str | None]:
        given = headers.get(INPUT)
        if given is None:
            raise ProofError(
                "the request carries no proof of this cluster's secret: give its sender the same security.secret"
            )
        match = _INPUT.fullmatch(given)
        if match is None:
            raise ProofError("the request's proof is of a form that this version does not know")
        key = self._secrets.find(bytes.fromhex(match[4]))
        if key is None:
            known = " and ".join(key.id.hex() for key in self._secrets.accepted)
            raise ProofError(
                f"the request is proved by secret {match[4]}, this server knows {known}: give both one security.secret"
            )
        return match[1], int(match[2]), base64.b64decode(match[3]), key, match[5]

    def _check_time(self, created: int) -> None:
        off_s = int(self._clock.wall()) - created
        if abs(off_s) > self._limits.skew_s:
            when = f"{off_s} s ago" if off_s > 0 else f"{-off_s} s from now"
            raise ProofError(
                f"the request was made {when} by its sender's clock, and {self._limits.skew_s:g} s are allowed: "
                "set the clocks of both machines, or somebody sends an old request again"
            )


class FrameSeal:
    """MACs of the frames of one answer, in their order. Each side has its own: one seals, the other opens."""

    def __init__(self, proof: Proof, context: bytes) -> None:
        self._proof, self._context = proof, context
        self._key: MacKey | None = None  # most answers have no frames
        self._number = 0

    def seal(self, payload: bytes) -> bytes:
        """The next frame's payload and its MAC."""
        return payload + self._mac(payload)

    def open(self, sealed: bytes) -> bytes:
        """The payload of the next frame. Raises ProofError where it is another one's, or none of who was asked."""
        payload = sealed[:-SEAL_BYTES]
        if not hmac.compare_digest(sealed[-SEAL_BYTES:], self._mac(payload)):
            raise ProofError("a frame of the answer was changed, left out or put in on its way")
        return payload

    def _mac(self, payload: bytes) -> bytes:
        self._number += 1
        if self._key is None:
            made_by = self._proof.key.mac_key(KeyLabel.HTTP, self._context)
            self._key = MacKey(made_by.digest(b"frames\0" + self._proof.signature.encode()))
        return self._key.digest(self._number.to_bytes(8, "big") + payload)[:SEAL_BYTES]


class ProvenReply(NamedTuple):
    """What the head of an answer proves."""

    digest: str | None
    """Of its body; None: it is a stream of frames."""
    seal: FrameSeal
    """Opens them."""

    def check(self, body: bytes) -> None:
        """Raises ProofError unless this is the whole body that was proved."""
        if self.digest != digest_of(body):
            raise ProofError("the answer's body is not the one that its proof was made for: it was changed on its way")


def why_unproven(server: str, status: int, headers: Mapping[str, str], beginning: bytes) -> str:
    """What is wrong with an answer that is not proven. `beginning`: of a refusal's body, which may say which secret is
    wanted. It is told, and nothing is made of it: whoever sits between us and the server could have made it up."""
    if status >= 400 and not headers.get(SIGNATURE):
        said = json.dumps(beginning.decode("utf-8", "replace"))
        return f"{server} answered {status} without a proof of this cluster's secret: {said}"
    why = "give it the same security.secret, or it is a stranger"
    why = "its answer's proof is wrong" if headers.get(SIGNATURE) else why
    return f"{server} does not know this cluster's secret: {why}"


def check_body(proof: Proof, body: bytes) -> None:
    """Raises ProofError unless this is the body that was proved."""
    check_digest(proof, digest_of(body))


def check_digest(proof: Proof, digest: str) -> None:
    """As `check_body`, by the `digest_of` the body."""
    if digest != proof.digest:
        raise ProofError("the request's body is not the one that its proof was made for")


def digest_of(body: bytes) -> str:
    """A Content-Digest."""
    return digest_text(hashlib.sha256(body).digest())


def digest_text(sha256: bytes) -> str:
    """A Content-Digest of that hash."""
    return f"sha-256=:{_base64(sha256)}:"


def _base(method: str, authority: str, target: str, digest: str, params: str) -> bytes:
    path, _, query = target.partition("?")
    text = (
        f'"@method": {method}\n"@authority": {authority}\n"@path": {path}\n"@query": ?{query}\n'
        f'"content-digest": {digest}\n"@signature-params": {params}'
    )
    return text.encode("utf-8", "surrogateescape")


@lru_cache(maxsize=16)
def _reply_params(key_id: str, streams: bool) -> str:
    covered = _STREAM_COVERED if streams else _WHOLE_COVERED
    return f'{covered};keyid="{key_id}";alg="hmac-sha256";tag="kvferry-reply"'


def _sign_reply(proof: Proof, context: bytes, status: int, digest: str | None) -> str:
    theirs = proof.signature[len("kvferry=") :]
    params = _reply_params(proof.key.name, digest is None)
    whole = "" if digest is None else f'"content-digest": {digest}\n'
    base = f'"@status": {status}\n{whole}"signature";req;key="kvferry": {theirs}\n"@signature-params": {params}'
    return _sign(proof.key, context, base.encode())


def _sign(key: ClusterKey, context: bytes, base: bytes) -> str:
    return f"kvferry=:{_base64(key.mac_key(KeyLabel.HTTP, context).digest(base))}:"


def _base64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode()
