"""What the fields of a request may hold: lengths, ranges, names. Pure.

A violation is a MetadataProtocolError whose `param` is the path of the field.
"""

from collections.abc import Sequence

import msgspec

from kvcore.chunk_keys import KEY_BYTES, OWNER_BYTES
from kvcore.errors import MetadataProtocolError, ProofError
from kvcore.partitions import MAX_PARTITIONS
from kvcore.ports import why_no_node_url
from kvcore.trust.certificates import PeerNames
from kvcore.types import ChunkKey, OwnerTag, ReplicaRef
from metadata_server.account_messages import ImportRequest, OrphansRequest, RemoveOrphansRequest
from metadata_server.cache_messages import (
    BlendSwitchesRequest,
    ExpireRequest,
    MoveChunksRequest,
    PinRequest,
    RebalanceRequest,
    ReleaseRequest,
    RenewRequest,
)
from metadata_server.messages import (
    FromNode,
    ManifestEntry,
    MatchRequest,
    QuarantineRequest,
    RegisterRequest,
    ReserveRequest,
    Room,
    TellHoldingsRequest,
)

MAX_ITEMS = 65_536
"""Keys, items or ids in one request; manifest entries are bounded by the body's size."""
MAX_SECONDS = 3600.0
MAX_WAIT_SECONDS = 600.0
MAX_KEEP_SECONDS = 366 * 86_400.0
"""Of a pin or a chunk's time."""
MAX_NAME = 256
MAX_TEXT = 4096
MAX_BYTES = 1 << 50
MAX_GENERATION = 1 << 63
MAX_ADDRESSES = 16
MAX_SWITCHES = 1024
_KEY_LENGTHS = frozenset({KEY_BYTES})


def require(ok: bool, param: str, what: str) -> None:
    """Raise MetadataProtocolError for the field `param` unless `ok`."""
    if not ok:
        raise MetadataProtocolError(f"{param}: {what}", param=param)


def check_name(value: str, param: str, *, empty: bool = False) -> None:
    """At most MAX_NAME printable characters, at least one unless `empty` is allowed."""
    require(len(value) <= MAX_NAME and (empty or bool(value)) and value.isprintable(), param, "not a usable name")


def check_text(value: str, param: str) -> None:
    """At most MAX_TEXT printable characters."""
    require(len(value) <= MAX_TEXT and value.isprintable(), param, "too long or not printable")


def check_seconds(value: float, param: str, *, zero: bool = False, most: float = MAX_SECONDS) -> None:
    """Above 0 (or 0 where `zero` is allowed) and at most `most`."""
    require((value >= 0 if zero else value > 0) and value <= most, param, f"not within 0 .. {most:g} seconds")


def check_incarnation(value: int, param: str) -> None:
    """A number that fits 63 bits."""
    require(0 <= value < MAX_GENERATION, param, "out of range")


def check_items(values: Sequence[object], param: str) -> None:
    """At most MAX_ITEMS of them."""
    require(len(values) <= MAX_ITEMS, param, f"more than {MAX_ITEMS} items")


def check_key(key: ChunkKey, param: str) -> None:
    """The length of a chunk key."""
    require(len(key) == KEY_BYTES, param, f"a chunk key has {KEY_BYTES} bytes, got {len(key)}")


def check_keys(keys: Sequence[ChunkKey], param: str = "keys", field: str = "") -> None:
    """At most MAX_ITEMS chunk keys, each the `field` of an item if that is not empty."""
    check_items(keys, param)
    if not _KEY_LENGTHS.issuperset(map(len, keys)):
        for at, key in enumerate(keys):
            check_key(key, f"{param}[{at}]{field}")


def check_lengths(lengths: Sequence[int], param: str) -> None:
    """Of items, bytes."""
    if lengths and not (min(lengths) > 0 and max(lengths) < MAX_BYTES):
        for at, length in enumerate(lengths):
            require(0 < length < MAX_BYTES, f"{param}[{at}].length", "out of range")


def check_extents(entries: Sequence[ManifestEntry], param: str) -> None:
    """As `check_extent`, of many: a piece of a manifest has thousands."""
    for at, entry in enumerate(entries):
        if not (
            len(entry.key) == KEY_BYTES
            and 0 <= entry.offset < MAX_BYTES
            and 0 < entry.length < MAX_BYTES
            and 0 <= entry.generation < MAX_GENERATION
            and (entry.owner is msgspec.UNSET or len(entry.owner) == OWNER_BYTES)
        ):
            check_extent(entry, f"{param}[{at}]")
            check_owner(entry.owner, f"{param}[{at}].owner")


def check_owner(owner: OwnerTag | msgspec.UnsetType, param: str) -> None:
    """Whose chunks they are, or not known."""
    require(owner is msgspec.UNSET or len(owner) == OWNER_BYTES, param, f"has {OWNER_BYTES} bytes")


def check_extent(entry: ManifestEntry | ReplicaRef, param: str) -> None:
    """A place in a segment and the key of what lies there."""
    check_key(entry.key, f"{param}.key")
    require(0 <= entry.offset < MAX_BYTES, f"{param}.offset", "out of range")
    require(0 < entry.length < MAX_BYTES, f"{param}.length", "out of range")
    require(0 <= entry.generation < MAX_GENERATION, f"{param}.generation", "out of range")


def check_register(request: RegisterRequest) -> None:
    """A registration with its segments."""
    node, spoken = request.node, request.spoken
    require(1 <= spoken.oldest <= spoken.newest < MAX_ITEMS, "protocol", "not a range of versions")
    if isinstance(request.partitions, list):
        require(len(request.partitions) <= MAX_PARTITIONS, "partitions", "too many")
        for name in request.partitions:
            check_name(name, "partitions")
    if isinstance(request.partition, int):
        require(0 <= request.partition < MAX_PARTITIONS, "partition", "out of range")
    check_name(node.id, "node.id")
    check_incarnation(node.incarnation, "node.incarnation")
    check_text(node.control_url, "node.control_url")
    if node.control_url and (why := why_no_node_url(node.control_url)) is not None:
        require(False, "node.control_url", why)
    require(len(node.fingerprint) in (0, 16), "node.fingerprint", "has 16 bytes or none")
    check_text(node.cluster, "node.cluster")
    check_text(node.model, "node.model")
    check_name(node.tokenizer_digest, "node.tokenizer_digest", empty=True)
    require(1 <= node.protocol < MAX_ITEMS, "node.protocol", "not a version")
    check_seconds(request.ttl_s, "ttl_s")
    require(len(request.segments) <= MAX_NAME, "segments", "too many")
    for at, manifest in enumerate(request.segments):
        segment, path = manifest.segment, f"segments[{at}]"
        check_name(segment.id, f"{path}.segment.id")
        check_name(segment.host_id, f"{path}.segment.host_id", empty=True)
        require(0 < segment.size_bytes < MAX_BYTES, f"{path}.segment.size_bytes", "out of range")
        require(len(segment.addresses) <= MAX_ADDRESSES, f"{path}.segment.addresses", "too many")
        if isinstance(manifest.room, Room):
            require(0 <= manifest.room.start < MAX_BYTES, f"{path}.room.start", "out of range")
            require(0 < manifest.room.length < MAX_BYTES, f"{path}.room.length", "out of range")
        for transport, address in segment.addresses.items():
            check_name(transport, f"{path}.segment.addresses")
            check_text(address, f"{path}.segment.addresses")
        check_extents(manifest.entries, f"{path}.entries")


def check_import(request: ImportRequest) -> None:
    """A piece of a manifest."""
    check_name(request.node_id, "node_id")
    check_incarnation(request.incarnation, "incarnation")
    check_name(request.segment_id, "segment_id")
    check_incarnation(request.number, "number")
    check_items(request.entries, "entries")
    check_extents(request.entries, "entries")


def check_orphans(request: OrphansRequest | RemoveOrphansRequest) -> None:
    """A look at what is orphaned, or a removal."""
    check_items(request.known, "known")
    check_seconds(request.older_s, "older_s", zero=True, most=MAX_KEEP_SECONDS)
    if isinstance(request, RemoveOrphansRequest):
        check_items(request.ids, "ids")


def check_quarantine(request: QuarantineRequest) -> None:
    """Replicas that a reader refused."""
    check_items(request.items, "items")
    for at, item in enumerate(request.items):
        check_extent(item.replica, f"items[{at}].replica")


def check_tell_holdings(request: TellHoldingsRequest) -> None:
    """What came to a node's disk and left it."""
    check_name(request.node_id, "node_id")
    check_incarnation(request.incarnation, "incarnation")
    check_keys(request.added, "added")
    check_keys(request.removed, "removed")


def check_renew(request: RenewRequest) -> None:
    """Leases to be renewed."""
    check_name(request.node_id, "node_id")
    check_incarnation(request.incarnation, "incarnation")
    check_items(request.lease_ids, "lease_ids")
    check_seconds(request.lease_s, "lease_s")


def check_release(request: ReleaseRequest) -> None:
    """Leases to be ended."""
    check_items(request.lease_ids, "lease_ids")
    check_items(request.lease_names or (), "lease_names")


def check_rebalance(request: RebalanceRequest) -> None:
    """An order to even segments out."""
    require(0 <= request.most_bytes < MAX_BYTES, "most_bytes", "out of range")


def check_switches(request: BlendSwitchesRequest) -> None:
    """What a router tells of kinds of documents."""
    require(len(request.switches) <= MAX_SWITCHES, "switches", f"more than {MAX_SWITCHES}")
    for number, one in enumerate(request.switches):
        where = f"switches[{number}]"
        check_text(one.model, f"{where}.model")
        check_name(one.kind, f"{where}.kind")
        check_text(one.off, f"{where}.off")
        require(0 <= one.number < MAX_GENERATION, f"{where}.number", "out of range")
        require(one.at >= 0, f"{where}.at", "negative")


def check_move(request: MoveChunksRequest) -> None:
    """A question what to move."""
    check_name(request.node_id, "node_id")
    check_incarnation(request.incarnation, "incarnation")
    check_keys(request.copied, "copied")
    require(0 < request.most_bytes < MAX_BYTES, "most_bytes", "out of range")
    check_seconds(request.ttl_s, "ttl_s")


def check_keep(request: PinRequest | ExpireRequest) -> None:
    """Chunks that are to stay, or to go, for a time."""
    check_keys(request.keys)
    if request.ttl_s is not None:
        check_seconds(request.ttl_s, "ttl_s", most=MAX_KEEP_SECONDS)


def speaker_of(request: object) -> str:
    """The node in whose name a request is made; empty: in nobody's."""
    if isinstance(request, RegisterRequest):
        return request.node.id
    return request.node_id if isinstance(request, FromNode | MatchRequest | ReserveRequest | ImportRequest) else ""


def check_speaker(request: object, names: PeerNames | None) -> None:
    """Raises ProofError for who speaks in the name of a node that is not among `names`; None: all are."""
    if names is None or not (node_id := speaker_of(request)) or node_id in names:
        return
    shown = ", ".join(sorted(names)[:8]) or "none"
    raise ProofError(
        f"the request is node {node_id}'s, and its sender's certificate has the names {shown}: "
        f"give that node a certificate with {node_id} among its DNS names (security.tls, security.nodes)"
    )
