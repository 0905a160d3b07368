"""Which call is split and merged how: a row for each call that is about more than one node. Values only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from metadata_server import endpoints as e
from metadata_server.partitions import merging as m
from metadata_server.partitions import splitting as s


@dataclass(frozen=True, slots=True)
class Rule:
    """`merge` is given the request, the pieces, and for each its answer or None. `all_or_none`: it is a failure where
    one partition does not answer, and the caller asks all again."""

    split: s.Splitter
    merge: Callable[[Any, Any, Any], Any]
    all_or_none: bool = False


OF_ONE_NODE = frozenset(row.path for row in (e.REGISTER, e.IMPORT, e.HEARTBEAT))
"""A node is told of each partition by itself, as it is known to each by itself."""

RULES: Mapping[str, Rule] = {
    row.path: rule
    for row, rule in (
        (e.LEAVE, Rule(s.to_all, m.merge_nothing, all_or_none=True)),
        (e.RELEASE_WRITER, Rule(s.to_all, m.merge_nothing, all_or_none=True)),
        (e.ORDER_NODE, Rule(s.to_all, m.merge_order, all_or_none=True)),
        (e.MOVE_CHUNKS, Rule(s.by_moves, m.merge_moves)),
        (e.MATCH, Rule(s.by_prefix, m.merge_match)),
        (e.WAIT, Rule(s.by_prefix, m.merge_match)),
        (e.RESERVE, Rule(s.by_items, m.merge_reserve)),
        (e.COMMIT, Rule(s.by_replica_ids, m.merge_commit)),
        (e.ABORT, Rule(s.by_replica_ids, m.merge_nothing, all_or_none=True)),
        (e.QUARANTINE, Rule(s.by_replicas, m.merge_nothing)),
        (e.RELEASE, Rule(s.by_leases_and_names, m.merge_nothing, all_or_none=True)),
        (e.RENEW, Rule(s.by_leases, m.merge_renew)),
        (e.TELL_HOLDINGS, Rule(s.by_holdings, m.merge_holdings)),
        (e.FIND_HOLDERS, Rule(s.by_keys, m.merge_holders)),
        (e.PIN, Rule(s.by_keys, m.merge_counts, all_or_none=True)),
        (e.UNPIN, Rule(s.by_keys, m.merge_counts, all_or_none=True)),
        (e.EVICT, Rule(s.by_keys, m.merge_counts, all_or_none=True)),
        (e.EXPIRE, Rule(s.by_keys, m.merge_counts, all_or_none=True)),
        (e.PINS, Rule(s.to_all, m.merge_pins)),
        (e.NODE_ORDERS, Rule(s.to_all, m.merge_orders)),
        (e.REBALANCE, Rule(s.by_share, m.merge_rebalance, all_or_none=True)),
        (e.REBALANCING, Rule(s.to_all, m.merge_rebalance, all_or_none=True)),
        (e.ORPHANS, Rule(s.to_all, m.merge_orphans, all_or_none=True)),
        (e.REMOVE_ORPHANS, Rule(s.to_all, m.merge_removed, all_or_none=True)),
        (e.BLEND_SWITCHES, Rule(s.to_all, m.merge_switches)),
        (e.NODES, Rule(s.to_all, m.merge_nodes)),
        (e.STATS, Rule(s.to_all, m.merge_stats)),
    )
}
