"""Bodies of the metadata protocol: decoding with the bounds of their endpoint, encoding. Msgpack and JSON alike.

And the table of calls, bound to one core.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import msgspec

from kvcore.errors import MetadataProtocolError
from kvcore.trust.certificates import PeerNames
from metadata_server.bounds import check_speaker
from metadata_server.endpoints import ENDPOINTS, EndpointSpec, Rep, Req

if TYPE_CHECKING:
    from metadata_server.core import MetadataCore

_FIELD = re.compile(r" - at `\$\.?([^`]*)`$")


class RequestDecoder(Generic[Req]):
    """Bodies of one endpoint that has a request, in either format."""

    def __init__(self, endpoint: EndpointSpec[Req, Rep]) -> None:
        assert endpoint.request is not None, f"{endpoint.path} takes no body"
        self._msgpack = msgspec.msgpack.Decoder(endpoint.request)
        self._json = msgspec.json.Decoder(endpoint.request)
        self._check = endpoint.check

    def decode(self, body: bytes, *, json: bool, names: PeerNames | None = None) -> Req:
        """The checked request. `names`: the nodes for which its sender may speak; None: any. Raises ProofError,
        MetadataProtocolError, its `param` the path of the field."""
        try:
            request = self._json.decode(body) if json else self._msgpack.decode(body)
        except msgspec.ValidationError as error:
            found = _FIELD.search(str(error))
            raise MetadataProtocolError(str(error), param=found.group(1) if found else None) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            kind = "JSON" if json else "msgpack"
            raise MetadataProtocolError(f"the body is not valid {kind}: {error}") from error
        self._check(request)
        check_speaker(request, names)
        return request


def encode(reply: object, *, json: bool) -> bytes:
    """A reply's bytes."""
    return msgspec.json.encode(reply) if json else msgspec.msgpack.encode(reply)


class Asker(NamedTuple):
    """Whose a call is."""

    address: str = ""
    """For the log of operators' orders."""
    speaks_for: PeerNames | None = None
    """The nodes in whose names he may speak; None: any."""


ANYBODY = Asker()


@dataclass(frozen=True, slots=True)
class BoundCall:
    """A row of the table, bound to one core."""

    handle: Callable[[Any, float], Any]
    decode: Callable[..., Any]
    is_async: bool
    about: Callable[[Any], str] | None
    outcome: Callable[[Any], str]
    in_turn: bool


def _no_body(body: bytes, *, json: bool, names: PeerNames | None) -> None:
    """The request of a GET."""


def bound_calls(core: "MetadataCore") -> dict[str, BoundCall]:
    """Each row of the table, by its path. Handlers of the state are those of the state that the core has now."""
    return {
        row.path: BoundCall(
            row.handler(core),
            RequestDecoder(row).decode if row.request else _no_body,
            row.waits or row.durable,
            row.about,
            row.outcome,
            row.in_turn,
        )
        for row in ENDPOINTS
    }
