"""What the OpenAPI document says of a request's fields is what the server accepts and refuses, field by field."""

import base64
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from support.metadata_words import granted, ids, keys, new_state, registration, reservation

from kvcore.chunk_keys import owner_of
from kvcore.errors import MetadataProtocolError
from metadata_server import account_messages as ac
from metadata_server import cache_messages as c
from metadata_server import messages as m
from metadata_server.endpoints import ENDPOINTS
from metadata_server.protocol import RequestDecoder
from metadata_server.shell.openapi import document

SCHEMAS: dict[str, Any] = document()["components"]["schemas"]  # type: ignore[index,assignment]
NODE = {"node_id": "a", "incarnation": 1}
WITHOUT = {
    ("SegmentManifest", "entries"),  # the length of the body bounds them
    *(("NodeOrderRequest", field) for field in ("action", "move", "force", "role")),  # words and truth values
    ("RebalanceRequest", "action"),
    ("RemoveOrphansRequest", "kind"),  # words
    ("PinRequest", "extend"),  # true or false
    ("ReplicaRef", "id"),  # any number: what is not known is answered so
    ("ReplicaRef", "segment_id"),
    ("Segment", "node_id"),  # the node's own
    ("ReserveRequest", "only_preferred"),  # true or false
    ("ReleaseWriterRequest", "hangs"),
    *((kind, "in_order") for kind in ("MatchRequest", "WaitRequest", "ReserveRequest")),
    ("TellHoldingsRequest", "reset"),
    ("RegisterRequest", "in_pieces"),
    ("ImportRequest", "last"),
}


def examples() -> dict[str, Any]:
    """A request of each kind that is accepted, as JSON, with every field."""
    state = new_state()
    entry = m.ManifestEntry(key=keys(1)[0], offset=0, length=1, generation=1, owner=owner_of(b"salt"))
    state.register(registration("a"), 0.0)
    (replica,) = granted(state.reserve(reservation("a", [1]), 0.0))
    register = msgspec.structs.replace(
        registration("a", entries=[entry]),
        protocol=1,
        oldest_protocol=1,
        in_pieces=False,
        partitions=["a", "b"],
        partition=1,
    )
    manifest = msgspec.structs.replace(register.segments[0], room=m.Room(start=0, length=1))
    register = msgspec.structs.replace(register, segments=[manifest])
    requests: list[msgspec.Struct] = [
        register,
        ac.ImportRequest(**NODE, segment_id="a.1", number=1, entries=[entry]),
        m.HeartbeatRequest(**NODE),
        m.LeaveRequest(**NODE),
        c.ReleaseWriterRequest(**NODE, hangs=True),
        m.MatchRequest(keys=keys(1), **NODE, in_order=True, lease_name=1, owner=owner_of(b"salt")),
        m.WaitRequest(keys=keys(1), timeout_s=1.0, **NODE, in_order=True, lease_name=1, owner=owner_of(b"salt")),
        msgspec.structs.replace(
            reservation("a", [1], prefer="a.1", owner=owner_of(b"salt")),
            only_preferred=True,
            in_order=True,
            write_name=1,
        ),
        m.TellHoldingsRequest(**NODE, added=keys(1), removed=keys(2)),
        m.FindHoldersRequest(keys=keys(1)),
        c.NodeOrderRequest(node_id="a", action="role", role="decoder"),
        c.MoveChunksRequest(**NODE, copied=keys(1), most_bytes=1, ttl_s=1.0),
        c.PinRequest(keys=keys(1), ttl_s=1.0),
        c.UnpinRequest(keys=keys(1)),
        c.RebalanceRequest(action="start", most_bytes=1),
        c.BlendSwitchesRequest(switches=[c.KindSwitch(model="m", kind="part", number=1, off="why", at=1.0)]),
        ac.OrphansRequest(known=["a"], older_s=1.0),
        ac.RemoveOrphansRequest(kind="pins", ids=["1"], known=["a"], older_s=1.0),
        c.EvictRequest(keys=keys(1)),
        c.ExpireRequest(keys=keys(1), ttl_s=1.0),
        ids("a", [replica]),
        m.QuarantineRequest(items=[m.QuarantineItem(replica=replica, reason=m.QuarantineReason.STALE)]),
        c.ReleaseRequest(lease_ids=[1], lease_names=[1]),
        c.RenewRequest(**NODE, lease_ids=[1], lease_s=1.0),
    ]
    return {type(request).__name__: msgspec.json.decode(msgspec.json.encode(request)) for request in requests}


EXAMPLES = examples()
DECODERS = {endpoint.request.__name__: RequestDecoder(endpoint) for endpoint in ENDPOINTS if endpoint.request}


def fields(kind: str, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, dict[str, Any]]]:
    """Where each field of a request is, the struct that it is of, and its schema; of a list its first item."""
    for name, schema in SCHEMAS[kind].get("properties", {}).items():
        yield (*path, name), kind, schema
        inner = schema.get("$ref") or schema.get("items", {}).get("$ref")
        if inner:
            step = (name, 0) if "items" in schema else (name,)
            yield from fields(inner.rpartition("/")[2], (*path, *step))


def edges(schema: dict[str, Any], value: Any) -> Iterator[tuple[Any, bool]]:
    """Values at the bounds that the schema states, and whether each is allowed."""
    step = 1 if schema.get("type") == "integer" else 0.001
    if "minimum" in schema:
        yield from [(schema["minimum"], True), (schema["minimum"] - step, False)]
    if "exclusiveMinimum" in schema:
        yield from [(schema["exclusiveMinimum"] + step, True), (schema["exclusiveMinimum"], False)]
    if "maximum" in schema:
        yield from [(schema["maximum"], True), (schema["maximum"] + step, False)]
    if schema.get("contentEncoding") == "base64":
        right = int(schema["description"].split()[0])
        yield from ((base64.b64encode(bytes(size)).decode(), size == right) for size in (right - 1, right, right + 1))
    elif "maxLength" in schema:
        begin = "http://" if "http" in schema.get("pattern", "") else ""
        long = begin + "x" * (schema["maxLength"] - len(begin))
        yield from [(long, True), (long + "x", False), ("\n", False), ("", "minLength" not in schema)]
    if "maxItems" in schema:
        most = schema["maxItems"]
        yield from [(value[:1] * most, True), (value[:1] * (most + 1), False)]
    if "maxProperties" in schema:
        most = schema["maxProperties"]
        yield from [({f"t{n}": "x" for n in range(most + extra)}, not extra) for extra in (0, 1)]


CASES = [
    pytest.param(
        kind,
        *found,
        id=f"{kind}:{'.'.join(map(str, found[0]))}",
        marks=[pytest.mark.slow] if found[0] in {("items",), ("entries",)} else [],  # 65,537 structs
    )
    for kind in DECODERS
    for found in fields(kind)
]


@pytest.mark.parametrize(("kind", "path", "of", "schema"), CASES)
def test_a_fields_bounds_are_those_that_are_stated(kind, path, of, schema):
    request, decoder = EXAMPLES[kind], DECODERS[kind]
    value = request
    for step in path:
        value = value[step]
    tried = list(edges(schema, value))
    struct = "$ref" in schema or "$ref" in schema.get("items", {})
    assert tried or struct or (of, path[-1]) in WITHOUT, "a field without bounds"
    for edge, allowed in tried:
        changed = msgspec.json.decode(msgspec.json.encode(request))
        at = changed
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = edge
        if path == ("protocol",):
            changed["oldest_protocol"] = min(edge, 1)
        elif path == ("oldest_protocol",):
            changed["protocol"] = edge
        try:
            decoder.decode(msgspec.json.encode(changed), json=True)
        except MetadataProtocolError as error:
            assert not allowed, (edge if len(str(edge)) < 99 else len(edge), error.message)
            assert path[-1] in str(error.param) or "protocol" in str(error.param)
        else:
            assert allowed, edge if len(str(edge)) < 99 else len(edge)


def test_items_of_keys_have_their_length():
    for kind in ("MatchRequest", "WaitRequest"):
        item = SCHEMAS[kind]["properties"]["keys"]["items"]
        assert (item["minLength"], item["maxLength"]) == (24, 24)
    for kind in ("ReserveRequest", "ManifestEntry", "MatchRequest", "WaitRequest"):
        owner = SCHEMAS[kind]["properties"]["owner"]
        assert (owner["minLength"], owner["maxLength"]) == (12, 12)
