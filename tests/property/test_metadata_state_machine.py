"""The metadata state against a simple model, in random order, with every invariant checked after each step."""

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.machines import longer, machine_settings
from support.metadata_words import UNIT, granted, ids, key, keys, new_state, registration, reservation

from kvcore.errors import NodeRefusedError
from kvcore.eviction.evictor import POLICY_NAMES
from kvcore.extents import ExtentAllocator
from metadata_server.cache_messages import EvictRequest, ExpireRequest, PinRequest, UnpinRequest
from metadata_server.index.limits import IndexLimits
from metadata_server.messages import (
    EventKind,
    HeartbeatRequest,
    LeaveRequest,
    ManifestEntry,
    QuarantineItem,
    QuarantineReason,
    QuarantineRequest,
)

NODES = ("a", "b", "c")
KEYS = 20
NUMBERS = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=5, unique=True)
NODE = st.sampled_from(NODES)
NOBODYS_SHARE, NOBODYS_LEASE_S = 0.4, 10.0
LIMITS = IndexLimits(most_swept=1, same_use_s=0.5, nobodys_share=NOBODYS_SHARE, nobodys_lease_s=NOBODYS_LEASE_S)


class MetadataMachine(RuleBasedStateMachine):
    """The model: who is alive till when, whose reservation ids are open till when, which (lease, keys) hold till when,
    and an index that only reads the event log."""

    @initialize(eviction=st.sampled_from(POLICY_NAMES))
    def begin(self, eviction):
        self.now = 0.0
        how = {"high_watermark": 0.9, "low_watermark": 0.5, "eviction": eviction}
        self.state = new_state(event_log=100_000, limits=LIMITS, **how)
        self.alive: dict[str, tuple[int, float]] = {}
        self.incarnations = dict.fromkeys(NODES, 0)
        self.replaced: dict[str, list[int]] = {node: [] for node in NODES}
        self.starts = 0
        self.nobodys: dict[int, int] = {}
        self.open: dict[int, tuple[str, int, float, object]] = {}
        self.leases: dict[int, tuple[frozenset, float, str | None]] = {}
        self.pins: dict[int, float] = {}
        self.seen: list = []  # replicas ever granted
        self.ids_seen: set[int] = set()
        self.generation = 0
        self.index: dict[str, set[bytes]] = {}
        self.up: set[str] = set()
        self.position = 1
        for node in NODES:
            self.register(node, newer=True, units=4)

    def live(self, node):
        return node in self.alive and self.alive[node][1] > self.now and self.alive[node][0] == self.incarnations[node]

    @rule(node=NODE, newer=st.sampled_from([False, False, False, True]), units=st.integers(1, 5))
    def register(self, node, newer, units):
        if newer or not self.live(node):
            self.starts += 1
            self.replaced[node] = [*self.replaced[node], self.incarnations[node]] if self.live(node) else []
            self.incarnations[node] = self.starts * 7919 % 104_729  # no two are the same, and they have no order
            self.lose(node)
            self.state.register(registration(node, units=units, incarnation=self.incarnations[node]), self.now)
        else:
            info = registration(node, units=units, incarnation=self.incarnations[node])
            sizes = {s.id: s.size_bytes for s in self.state.nodes(self.now).segments}
            if sizes[info.segments[0].segment.id] != units * UNIT:
                return
            self.state.register(info, self.now)
        self.alive[node] = (self.incarnations[node], self.now + 5.0)

    @rule(node=NODE, late=st.booleans(), data=st.data())
    def register_another(self, node, late, data):
        """A late message of an earlier start, or another process of the same id."""
        if not self.live(node) or (late and not self.replaced[node]):
            return
        request = registration(node, incarnation=data.draw(st.sampled_from(self.replaced[node])) if late else 1 << 20)
        if not late:
            info = msgspec.structs.replace(request.node, control_url="http://elsewhere")
            request = msgspec.structs.replace(request, node=info)
        try:
            self.state.register(request, self.now)
        except NodeRefusedError:
            return
        raise AssertionError("two processes of one id were let in")

    @rule(node=NODE)
    def heartbeat(self, node):
        known = self.state.heartbeat(
            HeartbeatRequest(node_id=node, incarnation=self.incarnations[node]), self.now
        ).known
        assert known == self.live(node)
        if known:
            self.alive[node] = (self.incarnations[node], self.now + 5.0)

    @precondition(lambda self: len(self.alive) == len(NODES))
    @rule(node=NODE)
    def leave(self, node):
        self.state.leave(LeaveRequest(node_id=node, incarnation=self.incarnations[node]), self.now)
        if self.live(node):
            del self.alive[node]
            self.lose(node)

    @rule()
    def sweep(self):
        self.state.sweep()

    def lose(self, node):
        """The node is gone: its reservations, all in its segment, and the leases that it holds."""
        self.open = {n: r for n, r in self.open.items() if node not in (r[0], r[3].segment_id.split(".")[0])}
        self.leases = {
            n: (frozenset(r for r in held if r.segment_id.split(".")[0] != node), until, who)
            for n, (held, until, who) in self.leases.items()
            if who != node
        }

    @rule(
        node=NODE, numbers=NUMBERS, units=st.integers(1, 2), prefer=st.none() | NODE, ttl_s=st.sampled_from([1.0, 60.0])
    )
    def reserve(self, node, numbers, units, prefer, ttl_s):
        wish = f"{prefer}.{self.incarnations[prefer]:x}" if prefer else None
        complete = {n for n in numbers if self.state.complete_prefix(keys(n), self.now)}
        request = reservation(node, numbers, units=units, prefer=wish, incarnation=self.incarnations[node], ttl_s=ttl_s)
        request = msgspec.structs.replace(request, in_order=True)
        evicted, pinned = self.state.counters["evicted"], set(self.state._pins.held)
        reply = self.state.reserve(request, self.now)
        assert pinned <= self.state._index.table.pins.keys()
        assert len(reply.outcomes) == len(numbers)
        replicas = granted(reply)
        assert not replicas or self.live(node)
        if self.state.counters["evicted"] == evicted:
            assert not complete & {n for n in numbers if key(n) in {r.key for r in replicas}}
        for replica in replicas:
            assert replica.id not in self.ids_seen and replica.generation > self.generation
            self.ids_seen.add(replica.id)
            self.generation = replica.generation
            self.open[replica.id] = (node, self.incarnations[node], self.now + ttl_s, replica)
        assert {s.id for s in reply.segments} == {r.segment_id for r in replicas}
        self.seen = [*self.seen, *replicas][-40:]

    @rule(node=NODE, numbers=NUMBERS, prefer=st.none() | NODE)
    def put(self, node, numbers, prefer):
        self.reserve(node, numbers, 1, prefer, 60.0)
        self.commit(node, [r for writer, _, _, r in self.open.values() if writer == node])

    @precondition(lambda self: self.open)
    @rule(share=st.sampled_from([1, 1, 2]))
    def commit_what_is_open(self, share):
        for node in NODES:
            self.commit(node, [r for writer, _, _, r in self.open.values() if writer == node][::share])

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), node=NODE, abort=st.booleans())
    def commit_or_abort(self, data, node, abort):
        chosen = data.draw(st.lists(st.sampled_from(self.seen), min_size=1, max_size=5))
        if abort:
            self.abort(node, chosen)
        else:
            self.commit(node, chosen)

    def mine(self, node, chosen):
        """Ids of those that this node may commit now."""
        return {
            r.id
            for r in chosen
            if r.id in self.open
            and self.open[r.id][:2] == (node, self.incarnations[node])
            and self.open[r.id][2] > self.now
            and self.live(node)
        }

    def abort(self, node, chosen):
        mine = self.mine(node, chosen)
        self.state.abort(ids(node, chosen, incarnation=self.incarnations[node]), self.now)
        for number in mine:
            del self.open[number]

    def commit(self, node, chosen):
        mine = self.mine(node, chosen)
        committed = self.state.commit(ids(node, chosen, incarnation=self.incarnations[node]), self.now).committed
        for replica, done in zip(chosen, committed, strict=True):
            assert done or replica.id not in mine
            if done:
                assert any(replica in refs for refs in self.state.match([replica.key], self.now).replicas)
        for number in mine:
            del self.open[number]

    @rule(numbers=NUMBERS, lease_s=st.sampled_from([0.0, 3.0, 20.0]), holder=st.none() | NODE)
    def match(self, numbers, lease_s, holder):
        who = {"node_id": holder, "incarnation": self.incarnations[holder]} if holder else {}
        there = [n for n in range(KEYS) if self.state.complete_prefix(keys(n), self.now)]
        numbers = there[: len(numbers)] + numbers  # mostly what can be found
        reply = self.state.match(keys(*numbers), self.now, lease_s=lease_s, **who, in_order=lease_s != 3.0)
        assert all(refs and {r.key for r in refs} == {key(n)} for refs, n in zip(reply.replicas, numbers, strict=False))
        pinned = sum(r.length for refs in reply.replicas for r in refs)
        held_by = holder if holder and self.live(holder) else None
        fits = held_by is not None or self.nobody_pins() + pinned <= NOBODYS_SHARE * self.room()
        assert bool(reply.lease_id) == bool(lease_s and reply.replicas and fits)
        if reply.lease_id:
            held = frozenset(r for refs in reply.replicas for r in refs)
            until = self.now + (lease_s if held_by else min(lease_s, NOBODYS_LEASE_S))
            self.leases[reply.lease_id] = (held, until, held_by)
            if held_by is None:
                self.nobodys[reply.lease_id] = pinned

    def nobody_pins(self):
        return sum(pinned for n, pinned in self.nobodys.items() if n in self.leases and self.leases[n][1] > self.now)

    def room(self):
        return sum(segment.size_bytes for segment in self.state.nodes(self.now).segments)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        number = data.draw(st.sampled_from(sorted(self.leases)))
        self.state.release([number], self.now)
        del self.leases[number]

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def quarantine(self, data):
        bad = data.draw(st.sampled_from(self.seen))
        item = QuarantineItem(replica=bad, reason=QuarantineReason.STALE)
        self.state.quarantine(QuarantineRequest(items=[item]), self.now)
        assert all(
            r.generation != bad.generation for refs in self.state.match([bad.key], self.now).replicas for r in refs
        )
        self.leases = {n: (held - {bad}, until, who) for n, (held, until, who) in self.leases.items()}

    @rule(numbers=NUMBERS, ttl_s=st.sampled_from([None, 1.0, 20.0]))
    def pin(self, numbers, ttl_s):
        taken = self.state.pins(None, self.now)
        reply = self.state.pin(PinRequest(keys=keys(*numbers), ttl_s=ttl_s), self.now)
        assert reply.done + reply.refused == len(numbers)
        for number in numbers[: reply.done]:
            self.pins[number] = self.now + (ttl_s or 1e9)
        after = self.state.pins(None, self.now)
        assert after.pinned_bytes <= max(after.most_bytes, taken.pinned_bytes)

    @rule(numbers=NUMBERS)
    def unpin(self, numbers):
        reply = self.state.unpin(UnpinRequest(keys=keys(*numbers)), self.now)
        assert reply.done == sum(self.pins.pop(n, 0.0) > self.now for n in numbers)

    @rule(numbers=NUMBERS)
    def evict(self, numbers):
        self.state.evict(EvictRequest(keys=keys(*numbers)), self.now)

    @rule(numbers=NUMBERS, ttl_s=st.sampled_from([0.5, 8.0]))
    def expire(self, numbers, ttl_s):
        self.state.expire(ExpireRequest(keys=keys(*numbers), ttl_s=ttl_s), self.now)

    @rule(seconds=st.sampled_from([0.5, 2.0, 3.0, 6.0]), silent=st.sampled_from([(), (), ("a",), ("b", "c")]))
    def advance(self, seconds, silent):
        self.now += min(seconds, 4.0) if not silent else 0.0
        for node in NODES:
            if node not in silent:
                self.heartbeat(node)
        self.now += seconds if silent else 0.0
        for node, (_, until) in list(self.alive.items()):
            if until <= self.now:
                del self.alive[node]
                self.lose(node)
        self.state.tick(self.now)

    @invariant()
    def everything_fits_together(self):
        self.state.check_invariants(self.now)
        stats = self.state.stats(self.now, 0)
        assert {n.id for n in stats.nodes} == {n for n in self.alive if self.live(n)}
        assert stats.read_leases == sum(until > self.now for _, until, _ in self.leases.values())
        assert stats.reservations == sum(until > self.now for _, _, until, _ in self.open.values())

    @invariant()
    def what_is_pinned_is_what_was_said(self):
        assert {pin.key for pin in self.state.pins(None, self.now).pins} == {
            key(n) for n, until in self.pins.items() if until > self.now
        }

    @invariant()
    def what_is_leased_stays(self):
        present = {
            (r.segment_id, r.offset, r.generation)
            for n in range(KEYS)
            for refs in self.state.match(keys(n), self.now).replicas
            for r in refs
        }
        for held, until, _ in self.leases.values():
            if until > self.now:
                assert {(r.segment_id, r.offset, r.generation) for r in held} <= present

    @invariant()
    def an_index_that_follows_the_events_is_right(self):
        log = self.state.log
        for event in log.since(self.position):
            if event.kind is EventKind.NODE_UP:
                self.up.add(event.node_id)
            elif event.kind is EventKind.NODE_DOWN:
                self.up.discard(event.node_id)
                self.index = {s: k for s, k in self.index.items() if s.split(".")[0] != event.node_id}
            elif event.kind is EventKind.STORED:
                assert not self.index.get(event.segment_id, set()) & set(event.keys)
                self.index.setdefault(event.segment_id, set()).update(event.keys)
            else:
                assert set(event.keys) <= self.index[event.segment_id]
                self.index[event.segment_id] -= set(event.keys)
        self.position = log.next_seq
        snapshot: dict[str, set[bytes]] = {}
        for batch in self.state.snapshot(self.now):
            for event in batch.events:
                if event.kind is EventKind.STORED:
                    snapshot.setdefault(event.segment_id, set()).update(event.keys)
        assert snapshot == {s: k for s, k in self.index.items() if k}
        assert self.up == {n.id for n in self.state.nodes(self.now).nodes}

    def teardown(self):
        """A new life of the server, told by the nodes, knows what the old one knew."""
        new = new_state(epoch="e2")
        before = {n: self.state.complete_prefix(keys(n), self.now) for n in range(KEYS)}
        by_segment: dict[str, list[ManifestEntry]] = {}
        for n in range(KEYS):
            for refs in self.state.match(keys(n), self.now).replicas:
                for r in refs:
                    entry = ManifestEntry(key=r.key, offset=r.offset, length=r.length, generation=r.generation)
                    by_segment.setdefault(r.segment_id, []).append(entry)
        for segment in self.state.nodes(self.now).segments:
            name, _, incarnation = segment.id.partition(".")
            units, entries = segment.size_bytes // UNIT, by_segment.get(segment.id, [])
            reply = new.register(registration(name, units, int(incarnation, 16), entries), self.now)
            assert reply.refused == 0
        assert before == {n: new.complete_prefix(keys(n), self.now) for n in range(KEYS)}
        new.check_invariants(self.now)
        self.state.check_invariants(self.now + 1000.0)
        assert self.state.stats(self.now + 1000.0, 0).reservations == 0


class AllocatorMachine(RuleBasedStateMachine):
    """Against a plain set of units."""

    @initialize(
        units=st.integers(1, 40),
        rest=st.integers(0, UNIT - 1),
        first=st.sampled_from([0, 0, 3]),
        block=st.sampled_from([1, 3, 1000]),
    )
    def begin(self, units, rest, first, block):
        self.space = ExtentAllocator(units * UNIT + rest, start=first * UNIT, block_bytes=block * UNIT)
        self.free = set(range(first, first + units))
        self.held: dict[int, int] = {}

    @rule(length=st.integers(1, 9 * UNIT))
    def allocate(self, length):
        need = -(-length // UNIT)
        fits = any(all(u + i in self.free for i in range(need)) for u in self.free)
        offset = self.space.allocate(length)
        assert (offset is not None) == fits
        if offset is not None:
            units = set(range(offset // UNIT, offset // UNIT + need))
            assert units <= self.free
            self.free -= units
            self.held[offset] = need

    @rule(unit=st.integers(-1, 41), off=st.sampled_from([0, 0, 0, 1]), length=st.integers(0, 5 * UNIT))
    def take(self, unit, off, length):
        wanted = set(range(unit, unit + -(-length // UNIT)))
        fits = not off and length > 0 and wanted <= self.free
        assert self.space.take(unit * UNIT + off, length) == fits
        if fits:
            self.free -= wanted
            self.held[unit * UNIT] = len(wanted)

    @rule()
    def settle(self):
        self.space.settle()

    @rule(units=st.integers(1, 4), count=st.integers(1, 6))
    def allocate_run(self, units, count):
        """As many as fit, as if they were asked for one by one."""
        taken = [(at, need * UNIT) for at, need in self.held.items()]
        other = ExtentAllocator(self.space.capacity, taken, start=self.space.start)
        most = 0
        while most < count and other.allocate(units * UNIT) is not None:
            most += 1
        offsets = self.space.allocate_run(units * UNIT, count)
        assert len(offsets) == most
        for offset in offsets:
            room = set(range(offset // UNIT, offset // UNIT + units))
            assert room <= self.free
            self.free -= room
            self.held[offset] = units

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        offset = data.draw(st.sampled_from(sorted(self.held)))
        self.space.release(offset, self.held[offset] * UNIT)
        self.free |= set(range(offset // UNIT, offset // UNIT + self.held.pop(offset)))

    @invariant()
    def tiles(self):
        self.space.check((offset, units * UNIT) for offset, units in self.held.items())
        assert self.space.free == len(self.free) * UNIT


TestMetadataMachine = MetadataMachine.TestCase
TestMetadataMachine.settings = machine_settings(20)
TestLongMetadataMachine = longer(MetadataMachine, 60)
TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = machine_settings(20)
TestLongAllocatorMachine = longer(AllocatorMachine, 60)
