"""Bounds of the metadata server's state."""

from dataclasses import dataclass

from kvcore.trust.limits import ProofLimits


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """What MetadataState holds at most, and for how long."""

    max_read_leases: int = 81_920
    max_leases_per_node: int = 20_480
    """Of one live node; of those of no node, together, the same share as of the room."""
    owners_share: float = 0.8
    """Of all leases, and of a node's, that the prompts of one tenant may have: others always have the rest. Without API
    keys all are one tenant's, but for what has a `cache_salt`."""
    longest_lease_s: float = 300.0
    """Of a live node, which may renew it while bytes move."""
    max_nodes: int = ProofLimits().max_nodes
    """Live ones."""
    max_given_back: int = 16_384
    """Names of leases that were given back before a request with that name came, about 100 bytes each."""
    nobodys_lease_s: float = 30.0
    """Longest read lease of one who is no live node: nothing else than time ends it. All of these together pin …"""
    nobodys_share: float = 0.25
    """… at most this share of the cluster's room, so that nobody from outside keeps the cache from changing."""
    max_replaced: int = 64
    """Earlier incarnations of a live node that are known, so that their late messages are refused."""
    max_moves: int = 256
    """Chunks of a node that are copied elsewhere with one call, …"""
    rows_a_move: int = 16_384
    """… for which so many are looked at, in about 15 ms, …"""
    moved_rows_a_second: int = 100_000
    """… and all again, where none could be moved, no faster than this."""
    even_within: float = 0.05
    """Segments are even whose use differs from the cluster's by no more than this share of their room."""
    rebalance_idle_s: float = 60.0
    """A run that moves nothing for so long is over."""
    max_node_orders: int = 65_536
    """Nodes that are drained or were removed."""
    max_tier_keys: int = 4_000_000
    """Chunks known to lie on nodes' disks, about 120 bytes each."""
    max_tier_keys_of_node: int = 2_000_000
    """Of one node: half of them, so that no node keeps the others' from being known."""
    max_reserved_of_node: int = 65_536
    """Chunks that one node has reserved and not written yet: a whole segment of most. More get no room until then."""
    max_pins: int = 1_000_000
    """Keys that are pinned, about 250 bytes each."""
    max_listed_pins: int = 10_000
    """In one answer."""
    same_use_s: float = 30.0
    """Uses of a chunk so soon after one that was counted are the same use, as a prompt is computed by one and read by
    another. It is for policies that count uses."""
    max_expected_links: int = 65_536
    """Chunks whose prefix is known before they come, about 250 bytes each."""
    max_known_commits: int = 1 << 20
    """Of so many reservations, the latest, a commit may be said again: 4 bytes each."""
    most_evicted: int = 256
    """Chunks that one makes room for in advance: nobody waits for thousands to go."""
    most_swept: int = 2048
    """Chunks of a segment that is gone, or of a disk, that are forgotten in one go, which takes some milliseconds."""
    forget_again_s: float = 1.0
    """A chunk whose time is up while it is read is looked at again after this."""
