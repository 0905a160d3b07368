"""Reservations of writers: granted, committed, given back, run out.

Owns their deadlines and their lists in the nodes. Invariants: a replica is RESERVED if and only if its live writer has
it in one of its grants, which has a deadline; the room of one that ended without a commit rests for the grace time.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat

import msgspec

from kvcore.config.schema import StoreConfig
from kvcore.types import ChunkKey
from metadata_server.index.chunks.latest import Grant
from metadata_server.index.chunks.placement import Placer
from metadata_server.index.chunks.replicas import ReplicaIndex
from metadata_server.index.chunks.rows import ReplicaState
from metadata_server.index.leases import Deadlines, Expiry
from metadata_server.index.nodes import LiveNode, NodeRegistry
from metadata_server.messages import (
    CommitRefusal,
    CommitReply,
    ReplicaIds,
    ReserveItem,
    ReserveOutcome,
    ReserveReply,
    ReserveRequest,
    ReserveStatus,
)

_EXISTS = ReserveOutcome(status=ReserveStatus.EXISTS)
_FULL = ReserveOutcome(status=ReserveStatus.FULL)


class Reservations:
    """Mutated by MetadataState only, which lets run out what is due before each call."""

    def __init__(
        self,
        config: StoreConfig,
        nodes: NodeRegistry,
        index: ReplicaIndex,
        deadlines: Deadlines,
        counts: Counter[str],
        *,
        first_grant: int = 0,
        step: int = 1,
    ) -> None:
        """Numbers of grants are above `first_grant`, each by `step` above the one before."""
        self._config = config
        self._nodes = nodes
        self._index = index
        self._deadlines = deadlines
        self._counts = counts
        self._grants: dict[int, Grant] = {}
        """By number."""
        self._by_name: dict[int, int] = {}
        self._last_grant, self._step = first_grant, step

    def __len__(self) -> int:
        return len(self._index.grants)

    def __repr__(self) -> str:
        return f"<Reservations {len(self)} open>"

    def oldest_s(self, now: float) -> float:
        """Since when the oldest has been open; 0: none is."""
        oldest = next(iter(self._grants.values()), None)  # they are in the order in which they began
        return 0.0 if oldest is None else now - oldest.began

    def reserve(self, request: ReserveRequest, now: float, *, wanted: bool = True) -> ReserveReply:
        """See MetadataState.reserve. Not `wanted`: its writer has given it back already."""
        node = self._nodes.get(request.node_id, request.incarnation)
        if not wanted:
            self._counts["declined_given_back"] += len(request.items)
            return ReserveReply(outcomes=[_FULL] * len(request.items))
        if node is None:
            self._counts["declined_unknown_writer"] += len(request.items)
            return ReserveReply(outcomes=[_FULL] * len(request.items))
        if len(request.items) > (room := max(0, self._nodes.limits.max_reserved_of_node - node.num_reserved)):
            return self._reserve_some(request, room, now)
        keys = [item.key for item in request.items]
        index = self._index
        if not index.complete.keys().isdisjoint(keys):
            # Before any eviction: room for a prefix's tail must not cost its head.
            there = [row for key in reversed(keys) for row in index.rows(key)]
            index.use(there)
            if isinstance(request.owner, bytes):
                index.own(there, request.owner)
        with self.granting(node, now, request.ttl_s, request.write_name or 0) as grant:
            outcomes = self._reserve_all(request, keys, node, grant)
        return ReserveReply(outcomes=outcomes, segments=index.segments_of(list(grant.rows.values())))

    def _reserve_some(self, request: ReserveRequest, room: int, now: float) -> ReserveReply:
        """Of a writer that has as much as one may, but for `room` chunks."""
        rest = len(request.items) - room
        self._counts["declined_too_many"] += rest
        reply = ReserveReply(outcomes=[])
        if room:
            reply = self.reserve(msgspec.structs.replace(request, items=request.items[:room]), now)
        return msgspec.structs.replace(reply, outcomes=[*reply.outcomes, *[_FULL] * rest])

    @contextmanager
    def granting(self, node: LiveNode, now: float, ttl_s: float, name: int = 0) -> Iterator[Grant]:
        """What is reserved with this grant runs out together."""
        self._last_grant += self._step
        grant = Grant(self._last_grant, node.info.id, node.number, now, name)
        yield grant
        self._counts["reserved"] += len(grant.rows)
        if grant.rows:
            node.num_reserved += len(grant.rows)
            self._grants[grant.number] = node.grants[grant.number] = grant
            self._deadlines.set((Expiry.RESERVATION, grant.number), now + ttl_s)
            if name:
                self._by_name[name] = grant.number

    def commit(self, request: ReplicaIds) -> CommitReply:
        """See MetadataState.commit."""
        # Each id is one of four:
        # 1. a reservation of this writer: committed now;
        # 2. of this writer, and complete: committed before, or twice in this request. True again: a retry is harmless;
        # 3. of this writer, but ended (aborted, run out): its room may be another's soon, so false;
        # 4. another's, unknown, or of a writer that is not registered: false.
        node = self._nodes.get(request.node_id, request.incarnation)
        if node is None:
            self._counts["commit_refused"] += len(request.replica_ids)
            gone = [CommitRefusal.WRITER_GONE] * len(request.replica_ids)
            return CommitReply(committed=[False] * len(gone), refusals=gone)
        rows, committed = self._take_all(request.replica_ids, node), [True] * len(request.replica_ids)
        if rows is None:
            grants, committed, fresh = self._index.grants, [], dict[int, int]()
            for number in request.replica_ids:
                grant = grants.get(number)
                if grant is not None and grant.writer == node.number:
                    fresh[number] = self._take(number)
                    committed.append(True)
                else:
                    committed.append(number in fresh or self._index.committed(number, node.number))
            rows = list(fresh.values())
        self._index.commit(rows)
        self._counts["committed"] += len(rows)
        self._counts["commit_refused"] += len(committed) - sum(committed)
        if all(committed):
            return CommitReply(committed=committed)
        refusals = [CommitRefusal.NONE if done else CommitRefusal.ENDED for done in committed]
        return CommitReply(committed=committed, refusals=refusals)

    def abort(self, request: ReplicaIds, now: float) -> None:
        """See MetadataState.abort."""
        node = self._nodes.get(request.node_id, request.incarnation)
        for number in request.replica_ids if node else ():
            grant = self._index.grants.get(number)
            if grant is not None and node is not None and grant.writer == node.number:
                self.end(number, now)
                self._counts["aborted"] += 1

    def end(self, number: int, now: float, *, writes_on: bool = False) -> None:
        """End one without a commit: its room rests, as a write that failed may still be landing. `writes_on`: its
        writer may know nothing of it, and write until the reservation's own time is up."""
        until = self._deadlines.at((Expiry.RESERVATION, self._index.grants[number].number)) if writes_on else None
        row = self._take(number)
        self._deadlines.set((Expiry.RETIRED, row), (until or now) + self._config.retire_grace_s)
        self._index.retire(row)

    def run_out(self, grant_number: int, now: float) -> None:
        """The time of what one call reserved is up."""
        for number in list(self._grants[grant_number].rows):
            self.end(number, now)
            self._counts["expired"] += 1

    def open_grants(self) -> Iterable[tuple[Grant, float | None]]:
        """What each call reserved that is still open, the oldest first, and when its time is up."""
        return [(grant, self._deadlines.at((Expiry.RESERVATION, number))) for number, grant in self._grants.items()]

    def end_grant(self, grant_number: int, now: float) -> None:
        """End what one call reserved, whose writer may still write."""
        for number in list(self._grants[grant_number].rows):
            self.end(number, now, writes_on=True)

    def give_back(self, names: Iterable[int], now: float) -> list[int]:
        """End what was reserved by these names: its writer has not seen it. Returns the names of which nothing is."""
        unknown: list[int] = []
        for name in names:
            if (grant_number := self._by_name.get(name)) is None:
                unknown.append(name)
                continue
            for number in list(self._grants[grant_number].rows):
                self.end(number, now)
                self._counts["aborted"] += 1
        return unknown

    def end_all_of(self, node: LiveNode, now: float, *, writes_on: bool) -> None:
        """End what the node has reserved anywhere. `writes_on` as of `end`."""
        for grant in list(node.grants.values()):
            for number in list(grant.rows):
                self.end(number, now, writes_on=writes_on)

    def forget(self, rows: Iterable[int]) -> None:
        """Forget those among the replicas of a segment that is dropped: there is no room that could rest."""
        states, generations = self._index.table.states, self._index.table.generations
        for row in rows:
            if states[row] == ReplicaState.RESERVED:
                self._take(generations[row])
            elif states[row] == ReplicaState.RETIRING:
                self._deadlines.drop((Expiry.RETIRED, row))

    def check(self) -> None:
        """Assert every invariant. For tests."""
        states = self._index.table.states
        for row, state in enumerate(states):
            assert ((Expiry.RETIRED, row) in self._deadlines) == (state == ReplicaState.RETIRING)
        for grant in self._grants.values():
            assert grant.rows and (Expiry.RESERVATION, grant.number) in self._deadlines
            node = self._nodes[grant.node_id]
            assert node.number == grant.writer and node.grants[grant.number] is grant, "a grant without its writer"
        assert all(self._grants[number].name == name for name, number in self._by_name.items())
        for node in self._nodes:
            assert node.num_reserved == sum(len(grant.rows) for grant in node.grants.values())
        assert len(self._grants) == sum(len(node.grants) for node in self._nodes)
        assert {number: id(grant) for grant in self._grants.values() for number in grant.rows} == {
            number: id(grant) for number, grant in self._index.grants.items()
        }

    def _take(self, number: int) -> int:
        """The row of a reservation that ends, one way or the other."""
        grant = self._index.grants.pop(number)
        row = grant.rows.pop(number)
        self._taken_from(grant, 1)
        return row

    def _take_all(self, numbers: list[int], node: LiveNode) -> list[int] | None:
        """As `_take` of each, if they are distinct and all of one grant of this writer, as almost always; else None."""
        grant, distinct = self._index.grants.get(numbers[0]) if numbers else None, set(numbers)
        if grant is None or grant.writer != node.number or len(distinct) < len(numbers):
            return None
        if not grant.rows.keys() >= distinct:
            return None
        deque(map(self._index.grants.pop, numbers), maxlen=0)
        rows = [*map(grant.rows.pop, numbers)]
        self._taken_from(grant, len(rows))
        return rows

    def _taken_from(self, grant: Grant, count: int) -> None:
        own = self._nodes.find(grant.node_id)
        if own is not None and grant.number in own.grants:
            own.num_reserved -= count
        if not grant.rows and self._grants.pop(grant.number, None) is not None:
            if self._by_name.get(grant.name) == grant.number:
                del self._by_name[grant.name]
            if own is not None:
                own.grants.pop(grant.number, None)
            self._deadlines.drop((Expiry.RESERVATION, grant.number))

    def _reserve_all(
        self, request: ReserveRequest, keys: list[ChunkKey], node: LiveNode, grant: Grant
    ) -> list[ReserveOutcome]:
        index, items, in_order = self._index, request.items, request.in_order is True
        segments, prefer, only = self._nodes.segments, request.prefer_segment or "", request.only_preferred is True
        closed = self._nodes.closed_segments()
        if only and prefer in node.segments:
            closed = frozenset()  # into its own a drained node may bring chunks from its disk, which others read there
        owner = request.owner if isinstance(request.owner, bytes) else None
        own = node.segments.values()
        placer = Placer(
            index.rooms, prefer=segments.get(prefer), own=own, only_preferred=only, owner=owner, closed=closed
        )
        distinct, end = len(set(keys)) == len(keys), 0
        outcomes: list[ReserveOutcome] = []
        while (at := len(outcomes)) < len(keys):
            # Four cases:
            # 1. A complete replica is there: nothing to write.
            # 2. It is being written by as many as are allowed, or wherever room is wanted: others are at it.
            # 3. No segment without a write of this key has room, even after eviction. What was evicted stays evicted.
            # 4. There is room: the replica is reserved in the writer's name, with those that follow and fit there too.
            there = index.writing.get(keys[at], ())
            taken = {index.record(row).segment.id for row in there}
            if keys[at] in index.complete:
                outcomes.append(self._declined(_EXISTS))
                continue
            nowhere = (prefer not in segments or prefer in taken) if only else len(taken | closed) == len(segments)
            if there and (len(there) >= self._config.max_replicas or nowhere):
                busy = ReserveOutcome(status=ReserveStatus.BUSY, writers=index.writers(keys[at]))
                outcomes.append(self._declined(busy))
                continue
            if at >= end:
                end = self._end_of_run(items, keys, at) if distinct and not there else at + 1
            place = placer.place(items[at].length, end - at, taken)
            if placer.evicted:
                index.forget(placer.evicted)
                self._counts["evicted"] += len(placer.evicted)
                self._counts["evicted_own"] += placer.evicted_own
                placer.evicted.clear()
                placer.evicted_own = 0
            if place is None:
                self._counts["declined_over_share"] += placer.over_share
                outcomes.append(self._declined(_FULL))
                continue
            writers = index.writers(keys[at])
            rows = index.reserve(
                keys[at : at + len(place.offsets)],
                items[at].length,
                place,
                grant,
                parent=keys[at - 1] if in_order and at else None,
                in_order=in_order,
            )
            if owner is not None:
                index.own(rows, owner)
            outcomes += map(ReserveOutcome, repeat(ReserveStatus.GRANTED), index.refs(rows), repeat(writers))
        return outcomes

    def _declined(self, result: ReserveOutcome) -> ReserveOutcome:
        self._counts[f"declined_{result.status.value}"] += 1
        return result

    def _end_of_run(self, items: list[ReserveItem], keys: list[ChunkKey], start: int) -> int:
        """Up to where the chunks from `start` on, of which that one is new, are all new and of one length."""
        complete, writing, length = self._index.complete, self._index.writing, items[start].length
        rest = keys[start + 1 :]
        if complete.keys().isdisjoint(rest) and writing.keys().isdisjoint(rest):
            return next((at for at in range(start + 1, len(keys)) if items[at].length != length), len(keys))
        for at in range(start + 1, len(keys)):
            if items[at].length != length or keys[at] in complete or keys[at] in writing:
                return at
        return len(keys)
