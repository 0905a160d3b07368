"""How the answers of several partitions become one, in the caller's order. None: a partition that did not answer. Pure.

What it knew is a miss, room there is none, and what it was to commit is not stored; nobody else's answer is touched.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import msgspec

from kvcore.types import NodeInfo, ReplicaRef, Segment
from metadata_server.account_messages import (
    OrphansOfKind,
    OrphansReply,
    RemoveOrphansReply,
    SegmentStats,
    Stats,
)
from metadata_server.cache_messages import (
    BlendSwitchesReply,
    CacheReply,
    MoveChunksReply,
    NodeOrderReply,
    NodeOrdersReply,
    PinsReply,
    RebalanceReply,
    RenewReply,
    RenewRequest,
    SegmentFill,
    latest_switches,
)
from metadata_server.messages import (
    CommitRefusal,
    CommitReply,
    FindHoldersReply,
    FindHoldersRequest,
    MatchReply,
    MatchRequest,
    NodesReply,
    Nothing,
    ReplicaIds,
    ReserveOutcome,
    ReserveReply,
    ReserveRequest,
    ReserveStatus,
    TellHoldingsReply,
)
from metadata_server.partitions.numbers import packed
from metadata_server.partitions.splitting import Piece

_R = TypeVar("_R")
_AWAY = ReserveOutcome(status=ReserveStatus.UNKNOWN)
Answers = Sequence[_R | None]


def merge_match(request: MatchRequest, pieces: Sequence[Piece[Any]], answers: Answers[MatchReply]) -> MatchReply:
    """The longest prefix of which each chunk was found, whoever has it. Of leases those that hold a chunk of it."""
    found: list[list[ReplicaRef] | None] = [None] * len(request.keys)
    writing = set[int]()
    for piece, answer in _answered(pieces, answers):
        have = len(answer.replicas)
        for at, replicas in zip(piece.at, answer.replicas, strict=False):
            found[at] = replicas
        writing.update(piece.at[have : have + answer.num_writing])
    prefix = [replicas for replicas in takewhile(lambda one: one is not None, found) if replicas is not None]
    first, wanted = len(prefix), {ref.segment_id for replicas in prefix for ref in replicas}
    replies = [answer for _, answer in _answered(pieces, answers)]
    return MatchReply(
        replicas=prefix,
        lease_id=packed(answer.lease_id for answer in _that_hold(pieces, answers, first)),
        segments=[each for each in _distinct(reply.segments for reply in replies) if each.id in wanted],
        writers=next((answer.writers for piece, answer in _answered(pieces, answers) if first in piece.at), []),
        num_writing=next(at for at in range(len(found) + 1 - first) if first + at not in writing),
        rebuilding=len(replies) < len(pieces) or any(reply.rebuilding for reply in replies),
    )


def leases_beyond(first: int, pieces: Sequence[Piece[Any]], answers: Answers[MatchReply]) -> list[int]:
    """Leases that hold no chunk of the prefix, which has `first` chunks: to be given back."""
    leases = [answer.lease_id for _, answer in _answered(pieces, answers) if answer.lease_id]
    held = {answer.lease_id for answer in _that_hold(pieces, answers, first)}
    return [lease_id for lease_id in leases if lease_id not in held]


def merge_reserve(
    request: ReserveRequest, pieces: Sequence[Piece[Any]], answers: Answers[ReserveReply]
) -> ReserveReply:
    """One outcome an item; those of a partition that is away are to be done without."""
    outcomes = [_AWAY] * len(request.items)
    for piece, answer in _answered(pieces, answers):
        for at, outcome in zip(piece.at, answer.outcomes, strict=False):
            outcomes[at] = outcome
    segments = _distinct(answer.segments for _, answer in _answered(pieces, answers))
    return ReserveReply(outcomes=outcomes, segments=segments)


def merge_commit(request: ReplicaIds, pieces: Sequence[Piece[Any]], answers: Answers[CommitReply]) -> CommitReply:
    """What a partition that is away was told is not stored, as far as the writer is concerned."""
    committed = [False] * len(request.replica_ids)
    refusals = [CommitRefusal.UNKNOWN] * len(request.replica_ids)
    for piece, answer in _answered(pieces, answers):
        for at, done in zip(piece.at, answer.committed, strict=False):
            committed[at], refusals[at] = done, CommitRefusal.NONE if done else CommitRefusal.UNKNOWN
        for at, refusal in zip(piece.at, answer.refusals, strict=False):
            refusals[at] = refusal
    return CommitReply(committed=committed, refusals=[] if all(committed) else refusals)


def merge_renew(request: RenewRequest, pieces: Sequence[Piece[Any]], answers: Answers[RenewReply]) -> RenewReply:
    """A number is renewed where one of its leases is, or may be: the reader goes on, and verifies what it reads."""
    renewed = [False] * len(request.lease_ids)
    for piece, answer in zip(pieces, answers, strict=True):
        done = [True] * len(piece.at) if answer is None else answer.renewed
        for at, one in zip(piece.at, done, strict=False):
            renewed[at] |= one
    return RenewReply(renewed=renewed)


def merge_holders(
    request: FindHoldersRequest, pieces: Sequence[Piece[Any]], answers: Answers[FindHoldersReply]
) -> FindHoldersReply:
    """For the keys up to the first that nobody has."""
    numbers: dict[str, int] = {}
    nodes: list[NodeInfo] = []
    holders: list[list[int]] = [[] for _ in request.keys]
    for piece, answer in _answered(pieces, answers):
        for node in answer.nodes:
            if numbers.setdefault(node.id, len(nodes)) == len(nodes):
                nodes.append(node)
        for at, having in zip(piece.at, answer.holders, strict=False):
            holders[at] = [numbers[answer.nodes[one].id] for one in having]
    end = next((at for at, having in enumerate(holders) if not having), len(holders))
    return FindHoldersReply(nodes=nodes, holders=holders[:end])


def merge_holdings(_: object, pieces: Sequence[Piece[Any]], answers: Answers[TellHoldingsReply]) -> TellHoldingsReply:
    """Whether all that answered know the node."""
    return TellHoldingsReply(known=all(answer.known for _, answer in _answered(pieces, answers)))


def merge_counts(_: object, pieces: Sequence[Piece[Any]], answers: Answers[CacheReply]) -> CacheReply:
    """Sums."""
    replies = [answer for _, answer in _answered(pieces, answers)]
    return CacheReply(
        known=sum(reply.known for reply in replies),
        done=sum(reply.done for reply in replies),
        refused=sum(reply.refused for reply in replies),
    )


def merge_pins(_: object, pieces: Sequence[Piece[Any]], answers: Answers[PinsReply]) -> PinsReply:
    """All of them."""
    replies = [answer for _, answer in _answered(pieces, answers)]
    return PinsReply(
        num_pins=sum(reply.num_pins for reply in replies),
        pinned_bytes=sum(reply.pinned_bytes for reply in replies),
        most_bytes=sum(reply.most_bytes for reply in replies),
        pins=[pin for reply in replies for pin in reply.pins],
    )


def merge_order(_: object, pieces: Sequence[Piece[Any]], answers: Answers[NodeOrderReply]) -> NodeOrderReply:
    """What holds now. It is refused where every partition refuses it: one that had taken it before refuses it again."""
    replies = [answer for _, answer in _answered(pieces, answers)]
    taken = [reply for reply in replies if not reply.refused]
    return next((reply for reply in taken if reply.order is not None), (taken or replies)[0])


def merge_orders(_: object, pieces: Sequence[Piece[Any]], answers: Answers[NodeOrdersReply]) -> NodeOrdersReply:
    """What any partition keeps of a node: they were all told."""
    orders = {order.node_id: order for _, answer in _answered(pieces, answers) for order in answer.orders}
    roles = {one.node_id: one for _, answer in _answered(pieces, answers) for one in answer.roles}
    return NodeOrdersReply(orders=list(orders.values()), roles=list(roles.values()))


def merge_moves(_: object, pieces: Sequence[Piece[Any]], answers: Answers[MoveChunksReply]) -> MoveChunksReply:
    """All moves. A partition that did not answer may have one more, and is to be told again of what was copied."""
    replies = [answer for _, answer in _answered(pieces, answers)]
    untold = [key for piece, one in zip(pieces, answers, strict=True) if one is None for key in piece.request.copied]
    return MoveChunksReply(
        moves=[move for reply in replies for move in reply.moves],
        segments=_distinct(reply.segments for reply in replies),
        left=sum(reply.left for reply in replies) + len(answers) - len(replies),
        more=any(reply.more for reply in replies),
        in_use=[*untold, *(key for reply in replies for key in reply.in_use)],
    )


def merge_rebalance(_: object, pieces: Sequence[Piece[Any]], answers: Answers[RebalanceReply]) -> RebalanceReply:
    """Each evens out its own part of each segment. The run is over when each one's is."""
    replies = [answer for _, answer in _answered(pieces, answers)]
    fills: dict[str, SegmentFill] = {}
    for each in (each for reply in replies for each in reply.segments):
        before = fills.get(each.segment_id)
        fills[each.segment_id] = each if before is None else _fill_of_both(before, each)
    used, size = (sum(each.used_bytes for each in fills.values()), sum(each.size_bytes for each in fills.values()))
    running = any(reply.running for reply in replies)
    return RebalanceReply(
        number=sum(reply.number for reply in replies),
        running=running,
        end="" if running else "; ".join(dict.fromkeys(reply.end for reply in replies)),
        most_bytes=sum(reply.most_bytes for reply in replies),
        moved_bytes=sum(reply.moved_bytes for reply in replies),
        moved_chunks=sum(reply.moved_chunks for reply in replies),
        share=used / (size or 1),
        to_move_bytes=sum(reply.to_move_bytes for reply in replies),
        segments=list(fills.values()),
    )


def merge_switches(_: object, pieces: Sequence[Piece[Any]], answers: Answers[BlendSwitchesReply]) -> BlendSwitchesReply:
    """What is right of all that any partition keeps: they are all told, those that are away the next time."""
    said = (switch for _, answer in _answered(pieces, answers) for switch in answer.switches)
    return BlendSwitchesReply(switches=latest_switches(said))


def merge_nodes(_: object, pieces: Sequence[Piece[Any]], answers: Answers[NodesReply]) -> NodesReply:
    """A node is there if any partition knows it."""
    replies = [answer for _, answer in _answered(pieces, answers)]
    return NodesReply(
        epoch=_epochs(replies),
        nodes=_distinct_nodes(reply.nodes for reply in replies),
        segments=_distinct(reply.segments for reply in replies),
        cluster=replies[0].cluster,
        model=replies[0].model,
    )


def merge_orphans(_: object, pieces: Sequence[Piece[Any]], answers: Answers[OrphansReply]) -> OrphansReply:
    """All of each kind; what several partitions name, as a dead node's segment, once."""
    replies = [answer for _, answer in _answered(pieces, answers)]
    kinds: dict[str, OrphansOfKind] = {}
    for each in (each for reply in replies for each in reply.kinds):
        before = kinds.get(each.kind)
        kinds[each.kind] = each if before is None else _orphans_of_both(before, each)
    return OrphansReply(kinds=list(kinds.values()), unknown=next((one.unknown for one in replies if one.unknown), ""))


def merge_removed(_: object, pieces: Sequence[Piece[Any]], answers: Answers[RemoveOrphansReply]) -> RemoveOrphansReply:
    """What is gone anywhere: who does not have it has nothing to remove."""
    replies = [answer for _, answer in _answered(pieces, answers)]
    removed = dict.fromkeys(one for reply in replies for one in reply.removed)
    return RemoveOrphansReply(removed=[*removed], unknown=next((one.unknown for one in replies if one.unknown), ""))


def merge_nothing(_: object, pieces: Sequence[Piece[Any]], answers: Answers[Nothing]) -> Nothing:
    """Done."""
    return Nothing()


def merge_stats(_: object, pieces: Sequence[Piece[Any]], answers: Answers[Stats]) -> Stats:
    """What all of them hold. Of a partition that is away nothing is known, as of a segment that is not told yet."""
    merged = merged_stats([answer for _, answer in _answered(pieces, answers)])
    return msgspec.structs.replace(merged, rebuilding=merged.rebuilding + list(answers).count(None))


def merged_stats(replies: Sequence[Stats]) -> Stats:
    """What all of these partitions hold, at least one."""
    segments: dict[str, SegmentStats] = {}
    for each in (each for reply in replies for each in reply.segments):
        before = segments.get(each.segment.id)
        segments[each.segment.id] = each if before is None else _of_both(before, each)
    counters = Counter[str]()
    for reply in replies:
        counters.update(reply.counters)
    refused = {one.node.id: one for reply in replies for one in reply.refused}
    return Stats(
        epoch=_epochs(replies),
        nodes=_distinct_nodes(reply.nodes for reply in replies),
        segments=list(segments.values()),
        objects=sum(reply.objects for reply in replies),
        reservations=sum(reply.reservations for reply in replies),
        read_leases=sum(reply.read_leases for reply in replies),
        waiters=sum(reply.waiters for reply in replies),
        counters=dict(counters),
        refused=list(refused.values()),
        rebuilding=sum(each.rebuilding for each in segments.values()),
    )


def _orphans_of_both(one: OrphansOfKind, other: OrphansOfKind) -> OrphansOfKind:
    listed = {orphan.id: orphan for orphan in (*one.listed, *other.listed)}
    twice = len(one.listed) + len(other.listed) - len(listed)
    ages = [age_s for age_s in (one.oldest_s, other.oldest_s) if age_s is not None]
    return OrphansOfKind(
        kind=one.kind,
        count=one.count + other.count - twice,
        oldest_s=max(ages, default=None),
        listed=sorted(listed.values(), key=lambda orphan: -(orphan.age_s or 0.0)),
    )


def _fill_of_both(one: SegmentFill, other: SegmentFill) -> SegmentFill:
    return msgspec.structs.replace(
        one,
        used_bytes=one.used_bytes + other.used_bytes,
        size_bytes=one.size_bytes + other.size_bytes,
        sheds=one.sheds or other.sheds,
    )


def _of_both(one: SegmentStats, other: SegmentStats) -> SegmentStats:
    return msgspec.structs.replace(
        one,
        used_bytes=one.used_bytes + other.used_bytes,
        reserved_bytes=one.reserved_bytes + other.reserved_bytes,
        retiring_bytes=one.retiring_bytes + other.retiring_bytes,
        room_bytes=one.room_bytes + other.room_bytes,
        num_replicas=one.num_replicas + other.num_replicas,
        rebuilding=one.rebuilding or other.rebuilding,
    )


def _answered(pieces: Sequence[Piece[Any]], answers: Answers[_R]) -> list[tuple[Piece[Any], _R]]:
    return [(piece, answer) for piece, answer in zip(pieces, answers, strict=True) if answer is not None]


def _that_hold(pieces: Sequence[Piece[Any]], answers: Answers[MatchReply], first: int) -> list[MatchReply]:
    """Those whose lease holds a chunk of the prefix of `first` chunks: a partition's first chunk is in it."""
    return [answer for piece, answer in _answered(pieces, answers) if answer.lease_id and piece.at[0] < first]


def _distinct(listed: Iterable[Iterable[Segment]]) -> list[Segment]:
    return list({segment.id: segment for some in listed for segment in some}.values())


def _distinct_nodes(listed: Iterable[Iterable[NodeInfo]]) -> list[NodeInfo]:
    return list({node.id: node for some in listed for node in some}.values())


def _epochs(replies: Iterable[NodesReply | Stats]) -> str:
    return "+".join(reply.epoch for reply in replies)
