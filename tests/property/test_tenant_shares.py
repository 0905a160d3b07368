"""Whatever is stored, read, pinned and given back, in whatever order: no tenant has more than its share of a segment,
and none loses a chunk to one that has its share."""

from collections import Counter

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.metadata_words import UNIT, granted, ids, in_pieces, key, keys, new_state, piece, registration, reservation

from kvcore.chunk_keys import owner_of
from kvcore.eviction.evictor import POLICY_NAMES
from metadata_server.cache_messages import EvictRequest, PinRequest, UnpinRequest
from metadata_server.index.limits import IndexLimits
from metadata_server.messages import EventKind, HeartbeatRequest, ManifestEntry

OWNERS = [owner_of(name) for name in (b"", b"a", b"b")]
KEYS = 8
"""Of each tenant: the keys of tenant t are 100 t and up."""
NODES = ("a", "b")
TENANT = st.integers(0, len(OWNERS) - 1)
NUMBERS = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=4, unique=True)
NODE = st.sampled_from(NODES)
SEGMENT = st.sampled_from([None, "a.1", "b.1"])
HOW = st.tuples(st.booleans(), st.booleans(), st.booleans())
"""In the wished-for segment alone; the keys are in order; committed at once."""


class QuotaMachine(RuleBasedStateMachine):
    """The model: whose each key is, and how much of each segment a tenant may have."""

    @initialize(eviction=st.sampled_from(POLICY_NAMES), share=st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    def begin(self, eviction, share):
        self.now, self.share, self.sizes = 0.0, share, {"a.1": 8, "b.1": 5}
        self.how = {"high_watermark": 0.9, "low_watermark": 0.5, "eviction": eviction, "tenant_share": share}
        self.state = new_state(limits=IndexLimits(same_use_s=0.5), **self.how)
        for node in NODES:
            self.state.register(registration(node, units=self.sizes[f"{node}.1"], ttl_s=5.0), self.now)
        self.open = []
        self.leases = []

    def replicas(self):
        """(segment, tenant, row and generation) -> units, as the replicas say."""
        table = self.state._index.table
        return {
            (segment_id, int.from_bytes(table.keys[row], "little") // 100, (row, table.generations[row])): units
            for segment_id, record in self.state._nodes.segments.items()
            for row in record.rows()
            for units in [-(-table.lengths[row] // UNIT)]
        }

    def taken(self, replicas=None):
        """(segment, tenant) -> units."""
        used = Counter()
        for (segment_id, tenant, _), units in (self.replicas() if replicas is None else replicas).items():
            used[segment_id, tenant] += units
        return used

    @rule(tenant=TENANT, numbers=NUMBERS, units=st.integers(1, 3), at=st.tuples(NODE, SEGMENT), how=HOW)
    def reserve(self, tenant, numbers, units, at, how):
        (node, prefer), (only, ordered, commit) = at, how
        before, first, position = self.replicas(), self.state.counters["declined_over_share"], self.state.log.next_seq
        numbers = [100 * tenant + number for number in numbers]
        request = reservation(node, numbers, units=units, prefer=prefer, owner=OWNERS[tenant])
        request = msgspec.structs.replace(request, in_order=ordered, only_preferred=only and prefer is not None)
        reply = self.state.reserve(request, self.now)
        stayed = self.replicas()
        left = self.taken({replica: units for replica, units in before.items() if replica in stayed})
        if all(left[name, tenant] + units > self.share * size for name, size in self.sizes.items()):
            for event in self.state.log.since(position):
                if event.kind is EventKind.REMOVED:
                    assert {int.from_bytes(k, "little") // 100 for k in event.keys} == {tenant}, "another's was evicted"
        declined = [outcome for outcome in reply.outcomes if outcome.status == "full"]
        assert self.state.counters["declined_over_share"] - first <= len(declined)
        if commit:
            self.state.commit(ids(node, granted(reply)), self.now)
        else:
            self.open.append((node, granted(reply)))

    @rule(commit=st.booleans())
    def end_one(self, commit):
        if self.open:
            node, replicas = self.open.pop(0)
            (self.state.commit if commit else self.state.abort)(ids(node, replicas), self.now)

    @rule(tenant=TENANT, numbers=NUMBERS, lease_s=st.sampled_from([0.0, 3.0]))
    def read(self, tenant, numbers, lease_s):
        wanted = keys(*(100 * tenant + number for number in numbers))
        match = self.state.match(wanted, self.now, lease_s=lease_s, node_id="a", incarnation=1, in_order=True)
        if match.lease_id:
            self.leases.append(match.lease_id)

    @rule()
    def release(self):
        if self.leases:
            self.state.release([self.leases.pop(0)], self.now)

    @rule(tenant=TENANT, number=st.integers(0, KEYS - 1), how=st.sampled_from(["pin", "unpin", "evict"]))
    def keep(self, tenant, number, how):
        wanted = [key(100 * tenant + number)]
        if how == "pin":
            self.state.pin(PinRequest(keys=wanted, ttl_s=2.0), self.now)
        elif how == "unpin":
            self.state.unpin(UnpinRequest(keys=wanted), self.now)
        else:
            self.state.evict(EvictRequest(keys=wanted), self.now)

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def wait(self, seconds):
        for _ in range(int(seconds * 10)):
            self.now += 0.1
            self.heartbeats()

    @rule(pieces=st.booleans())
    def restart(self, pieces):
        """The metadata server starts empty, and the nodes tell it what lies in their segments."""
        told = {node: [] for node in NODES}
        table = self.state._index.table
        for name, record in self.state._nodes.segments.items():
            for row in record.complete():
                owner = OWNERS[int.from_bytes(table.keys[row], "little") // 100]
                where = {"offset": table.offsets[row], "length": table.lengths[row]}
                entry = ManifestEntry(key=table.keys[row], **where, generation=table.generations[row], owner=owner)
                told[name.partition(".")[0]].append(entry)
        self.state, self.open, self.leases = new_state(limits=IndexLimits(same_use_s=0.5), **self.how), [], []
        for node in NODES:
            request = registration(node, self.sizes[f"{node}.1"], entries=[] if pieces else told[node])
            reply = self.state.register(in_pieces(request) if pieces else request, self.now)
            if pieces:
                self.state.import_piece(piece(node, reply.wanted[f"{node}.1"], told[node], last=True), self.now)

    def heartbeats(self):
        for node in NODES:
            assert self.state.heartbeat(HeartbeatRequest(node_id=node, incarnation=1), self.now).known

    @invariant()
    def none_has_more_than_its_share(self):
        self.state.check_invariants(self.now)
        used = {
            (name, owner): number // UNIT
            for name, record in self.state._nodes.segments.items()
            for owner, number in record._quotas.used_bytes.items()
        }
        taken = self.taken()
        assert used == {(name, OWNERS[tenant]): units for (name, tenant), units in taken.items()}
        assert all(units <= self.share * self.sizes[name] for (name, _), units in taken.items())


TestQuotas = QuotaMachine.TestCase
TestQuotas.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_who_gave_up_chunks_of_its_own_may_need_room_of_others_beside_it():
    """Its room and the free one are not neighbours: another's chunk, between them, goes. It is below its share then."""
    machine = QuotaMachine()
    machine.begin(eviction="lru", share=0.75)
    machine.reserve(tenant=1, numbers=[0, 2, 4, 6], units=2, at=("a", None), how=(False, False, True))
    machine.reserve(tenant=0, numbers=[0], units=2, at=("a", None), how=(False, False, True))
    assert machine.taken() == {("a.1", 1): 6, ("b.1", 1): 2, ("b.1", 0): 2}
    machine.reserve(tenant=1, numbers=[0, 7, 3], units=3, at=("a", "b.1"), how=(False, False, False))
    machine.none_has_more_than_its_share()
    assert machine.taken()["b.1", 1] == 3 and machine.taken()["b.1", 0] == 0
