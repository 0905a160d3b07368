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
from collections.abc import Callable
from typing import NamedTuple

from kvcore.errors import TransferProofError
from kvcore.trust.keys import KEY_ID_BYTES, ClusterKey, KeyLabel
from kvcore.trust.opening import ClusterTrust

NONCE_BYTES = 16
PROOF_BYTES = 32
CHALLENGE_BYTES = NONCE_BYTES + KEY_ID_BYTES + PROOF_BYTES

_MAX_KEYS = 8
_Nonce = Callable[[int], bytes]


class DirectionKeys(NamedTuple):
    """32 bytes for each end of one connection, which it alone seals with."""

    initiator: bytes
    target: bytes


class InitiatorGreeting:
    """One connection's, of who wants to read and write the segment. `hello`, then `answer`."""

    def __init__(
        self, trust: ClusterTrust, transport: str, segment_id: str, nonce: _Nonce = random.token_bytes
    ) -> None:
        assert trust.secrets is not None, "without a secret there is nothing to prove"
        self._trust = trust
        self._about = (transport, segment_id)
        self._keys = trust.secrets.accepted
        self._nonce = nonce(NONCE_BYTES)
        self._direction_keys: DirectionKeys | None = None

    def hello(self) -> bytes:
        """The first message."""
        return _pack_hello(self._nonce, self._keys, self._about[1])

    def answer(self, challenge: bytes | bytearray) -> bytes:
        """The last message. Raises TransferProofError for a target that does not know the secret."""
        if len(challenge) != CHALLENGE_BYTES:
            raise TransferProofError(f"the target's challenge has {len(challenge)} bytes, not {CHALLENGE_BYTES}")
        nonce, key_id = bytes(challenge[:NONCE_BYTES]), bytes(challenge[NONCE_BYTES:-PROOF_BYTES])
        key = next((key for key in self._keys if key.id == key_id), None)
        if key is None:
            raise TransferProofError(f"the target wants a proof by secret {key_id.hex()}, which we do not know")
        said = _about(*self._about, self._nonce, nonce)
        theirs, ours = _proofs(self._trust, key, said)
        if not hmac.compare_digest(theirs, bytes(challenge[-PROOF_BYTES:])):
            raise TransferProofError(f"what serves segment {self._about[1]} does not know this cluster's secret")
        self._direction_keys = _direction_keys(self._trust, key, said)
        return ours

    @property
    def direction_keys(self) -> DirectionKeys:
        """Once `answer` has returned."""
        assert self._direction_keys is not None, "the target has not proved anything yet"
        return self._direction_keys


class TargetGreeting:
    """One connection's, of who serves the segment. `challenge`, then `check`."""

    def __init__(self, trust: ClusterTrust, transport: str, nonce: _Nonce = random.token_bytes) -> None:
        assert trust.secrets is not None, "without a secret there is nothing to prove"
        self._trust = trust
        self._secrets = trust.secrets
        self._transport = transport
        self._nonce = nonce(NONCE_BYTES)
        self._wanted = b""
        self._direction_keys: DirectionKeys | None = None

    def challenge(self, hello: bytes | bytearray) -> tuple[str, bytes]:
        """The segment that is asked for, and the second message. Raises TransferProofError."""
        nonce, key_ids, segment_id = parse_hello(hello)
        key = next((key for key in self._secrets.accepted if key.id in key_ids), None)
        if key is None:
            shown = " and ".join(key_id.hex() for key_id in key_ids) or "none"
            known = " and ".join(key.id.hex() for key in self._secrets.accepted)
            raise TransferProofError(f"the initiator knows secret {shown}, and this node {known}")
        said = _about(self._transport, segment_id, nonce, self._nonce)
        ours, self._wanted = _proofs(self._trust, key, said)
        self._direction_keys = _direction_keys(self._trust, key, said)
        return segment_id, self._nonce + key.id + ours

    def check(self, proof: bytes | bytearray) -> None:
        """Raises TransferProofError unless the initiator has proved that it knows the secret."""
        if not self._wanted or not hmac.compare_digest(self._wanted, bytes(proof)):
            raise TransferProofError("the initiator's proof is wrong: it does not know this cluster's secret")

    @property
    def direction_keys(self) -> DirectionKeys:
        """Once `challenge` has returned; the initiator has them if `check` passes."""
        assert self._direction_keys is not None, "nothing was asked for yet"
        return self._direction_keys


def parse_hello(hello: bytes | bytearray) -> tuple[bytes, list[bytes], str]:
    """(nonce, ids of secrets, segment). Raises TransferProofError."""
    start = NONCE_BYTES + 1
    count = hello[NONCE_BYTES] if len(hello) >= start else _MAX_KEYS + 1
    end = start + count * KEY_ID_BYTES
    if count > _MAX_KEYS or len(hello) < end:
        raise TransferProofError("the greeting is cut short or of another form")
    ids = [bytes(hello[at : at + KEY_ID_BYTES]) for at in range(start, end, KEY_ID_BYTES)]
    return bytes(hello[:NONCE_BYTES]), ids, hello[end:].decode(errors="replace")


def _pack_hello(nonce: bytes, keys: tuple[ClusterKey, ...], segment_id: str) -> bytes:
    return nonce + bytes([len(keys)]) + b"".join(key.id for key in keys) + segment_id.encode()


def _about(transport: str, segment_id: str, initiators: bytes, targets: bytes) -> bytes:
    return initiators + targets + transport.encode() + b"\0" + segment_id.encode()


def _direction_keys(trust: ClusterTrust, key: ClusterKey, said: bytes) -> DirectionKeys:
    made_by = key.derive(KeyLabel.GREETING, trust.cluster.encode())
    ends = (b"sealed by initiator", b"sealed by target")
    return DirectionKeys(*(hmac.digest(made_by, end + b"\0" + said, "sha256") for end in ends))


def _proofs(trust: ClusterTrust, key: ClusterKey, said: bytes) -> tuple[bytes, bytes]:
    """Of the target, and of the initiator."""
    made_by = key.derive(KeyLabel.GREETING, trust.cluster.encode())
    target, initiator = (hmac.digest(made_by, role + b"\0" + said, "sha256") for role in (b"target", b"initiator"))
    return target, initiator
