"""How two ends of a transport prove to each other that they know the cluster's secret. Pure: bytes in, bytes out.

    initiator                                                  target
    HELLO      its nonce, the secrets that it knows, segment -->
               <-- CHALLENGE  its nonce, one of those secrets, its proof
    PROOF      its proof -->

A proof is an HMAC over both nonces, the transport, the segment and who makes it, so none fits another connection,
segment or role. Whoever only passes these bytes on learns no key. Of the same come keys for what follows on the
connection, one a direction: they are of this connection alone, since both ends drew a nonce for it.
"""

import hmac
import secrets as random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvcore.errors import TransferProofError
from kvcore.trust.keys import KEY_ID_BYTES, KeyLabel
from kvcore.trust.opening import ClusterTrust

NONCE_BYTES = 16
PROOF_BYTES = 32
CHALLENGE_BYTES = NONCE_BYTES + KEY_ID_BYTES + PROOF_BYTES

_MAX_KEYS = 8
_ONCE = bytes(12)
"""Nonce of the one message that is sealed under a connection's key."""
_Nonce = Callable[[int], bytes]


class GreetingKey(msgspec.Struct, frozen=True):
    """What proofs of greetings are made with, of one secret. Whoever has it can greet, and derives nothing else."""

    id: bytes
    """The secret's."""
    made_by: bytes

    def __repr__(self) -> str:
        return f"<GreetingKey {self.id.hex()}>"


Keys = Callable[[], Sequence[GreetingKey]]
"""Those of the secrets that are accepted now, the newest first; none: there is nothing to prove."""


def greeting_keys(trust: ClusterTrust) -> tuple[GreetingKey, ...]:
    """As Keys, for what a process trusts."""
    accepted = () if trust.secrets is None else trust.secrets.accepted
    context = trust.cluster.encode()
    return tuple(GreetingKey(key.id, key.derive(KeyLabel.GREETING, context)) for key in accepted)


class DirectionKeys(NamedTuple):
    """32 bytes for each end of one connection, which it alone seals with."""

    initiator: bytes
    target: bytes


class InitiatorGreeting:
    """One connection's, of who wants to read and write the segment. `hello`, then `answer`."""

    def __init__(
        self, keys: Sequence[GreetingKey], transport: str, segment_id: str, nonce: _Nonce = random.token_bytes
    ) -> None:
        assert keys, "without a secret there is nothing to prove"
        self._about = (transport, segment_id)
        self.keys = keys
        self._nonce = nonce(NONCE_BYTES)
        self._direction_keys: DirectionKeys | None = None

    def hello(self) -> bytes:
        """The first message."""
        return _pack_hello(self._nonce, self.keys, self._about[1])

    def answer(self, challenge: bytes | bytearray) -> bytes:
        """The last message. Raises TransferProofError for a target that does not know the secret."""
        if len(challenge) != CHALLENGE_BYTES:
            raise TransferProofError(f"the target's challenge has {len(challenge)} bytes, not {CHALLENGE_BYTES}")
        nonce, key_id = bytes(challenge[:NONCE_BYTES]), bytes(challenge[NONCE_BYTES:-PROOF_BYTES])
        key = next((key for key in self.keys if key.id == key_id), None)
        if key is None:
            raise TransferProofError(f"the target wants a proof by secret {key_id.hex()}, which we do not know")
        said = _about(*self._about, self._nonce, nonce)
        theirs, ours = _proofs(key, said)
        if not hmac.compare_digest(theirs, bytes(challenge[-PROOF_BYTES:])):
            raise TransferProofError(f"what serves segment {self._about[1]} does not know this cluster's secret")
        self._direction_keys = _direction_keys(key, said)
        return ours

    @property
    def answered(self) -> bool:
        """Whether `answer` has returned: the target has proved itself."""
        return self._direction_keys is not None

    @property
    def direction_keys(self) -> DirectionKeys:
        """Once it was `answered`."""
        assert self._direction_keys is not None, "the target has not proved anything yet"
        return self._direction_keys


class TargetGreeting:
    """One connection's, of who serves the segment. `challenge`, then `check`."""

    def __init__(self, keys: Sequence[GreetingKey], transport: str, nonce: _Nonce = random.token_bytes) -> None:
        assert keys, "without a secret there is nothing to prove"
        self._keys = keys
        self._transport = transport
        self._nonce = nonce(NONCE_BYTES)
        self._wanted = b""
        self._direction_keys: DirectionKeys | None = None

    def challenge(self, hello: bytes | bytearray) -> tuple[str, bytes]:
        """The segment that is asked for, and the second message. Raises TransferProofError."""
        nonce, key_ids, segment_id = parse_hello(hello)
        key = next((key for key in self._keys if key.id in key_ids), None)
        if key is None:
            shown = " and ".join(key_id.hex() for key_id in key_ids) or "none"
            known = " and ".join(key.id.hex() for key in self._keys)
            raise TransferProofError(f"the initiator knows secret {shown}, and this node {known}")
        said = _about(self._transport, segment_id, nonce, self._nonce)
        ours, self._wanted = _proofs(key, said)
        self._direction_keys = _direction_keys(key, said)
        return segment_id, self._nonce + key.id + ours

    def proves(self, proof: bytes | bytearray) -> bool:
        """Whether the initiator has proved that it knows the secret."""
        return bool(self._wanted) and hmac.compare_digest(self._wanted, bytes(proof))

    def check(self, proof: bytes | bytearray) -> None:
        """Raises TransferProofError unless it `proves` that."""
        if not self.proves(proof):
            raise TransferProofError("the initiator's proof is wrong: it does not know this cluster's secret")

    @property
    def direction_keys(self) -> DirectionKeys:
        """Once `challenge` has returned; the initiator has them if `check` passes."""
        assert self._direction_keys is not None, "nothing was asked for yet"
        return self._direction_keys


def seal_place(keys: DirectionKeys, place: bytes) -> bytes:
    """What a target tells an initiator that has proved itself, once a connection: AES-256-GCM."""
    return AESGCM(keys.target).encrypt(_ONCE, place, None)


def open_place(keys: DirectionKeys, sealed: bytes) -> bytes:
    """Raises TransferProofError for what this connection's target did not seal."""
    try:
        return AESGCM(keys.target).decrypt(_ONCE, sealed, None)
    except InvalidTag:
        raise TransferProofError("what the target tells of its segment was not sealed for this connection") from None


def parse_hello(hello: bytes | bytearray) -> tuple[bytes, list[bytes], str]:
    """(nonce, ids of secrets, segment). Raises TransferProofError."""
    start = NONCE_BYTES + 1
    count = hello[NONCE_BYTES] if len(hello) >= start else _MAX_KEYS + 1
    end = start + count * KEY_ID_BYTES
    if count > _MAX_KEYS or len(hello) < end:
        raise TransferProofError("the greeting is cut short or of another form")
    ids = [bytes(hello[at : at + KEY_ID_BYTES]) for at in range(start, end, KEY_ID_BYTES)]
    return bytes(hello[:NONCE_BYTES]), ids, hello[end:].decode(errors="replace")


def _pack_hello(nonce: bytes, keys: Sequence[GreetingKey], segment_id: str) -> bytes:
    return nonce + bytes([len(keys)]) + b"".join(key.id for key in keys) + segment_id.encode()


def _about(transport: str, segment_id: str, initiators: bytes, targets: bytes) -> bytes:
    return initiators + targets + transport.encode() + b"\0" + segment_id.encode()


def _direction_keys(key: GreetingKey, said: bytes) -> DirectionKeys:
    ends = (b"sealed by initiator", b"sealed by target")
    return DirectionKeys(*(hmac.digest(key.made_by, end + b"\0" + said, "sha256") for end in ends))


def _proofs(key: GreetingKey, said: bytes) -> tuple[bytes, bytes]:
    """Of the target, and of the initiator."""
    target, initiator = (hmac.digest(key.made_by, role + b"\0" + said, "sha256") for role in (b"target", b"initiator"))
    return target, initiator
