"""Readers and writers that die, are cancelled, or come late, against what lies in memory: every lease ends, no reader
under a lease meets bytes of another chunk, no late write hits room that is another's.

Memory is modelled byte-true in units: which generation was written where last. Clients keep their own side of the
contract (a writer stops at a share of its reservation's time, what is under way lands soon after), and know nothing
else.
"""

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.machines import machine_settings
from support.metadata_words import UNIT, granted, ids, key, keys, new_state, registration, reservation

from kvcore.types import ReplicaRef
from metadata_server.cache_messages import ReleaseWriterRequest, RenewRequest
from metadata_server.index.leases import Expiry
from metadata_server.index.limits import IndexLimits
from metadata_server.messages import (
    CommitRefusal,
    HeartbeatRequest,
    LeaveRequest,
    QuarantineItem,
    QuarantineReason,
    QuarantineRequest,
)

NODES, KEYS = ("a", "b"), 6
NODE = st.sampled_from(NODES)
SELDOM = st.sampled_from([False, False, False, True])
NUMBERS = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=4, unique=True)
GRACE_S, LATE_S, WRITABLE = 1.0, 0.9, 0.9
LEASE_S, NODE_S = 3.0, 5.0


@dataclass(eq=False)
class Grant:
    """A writer's claim. It writes until `write_by`; what it has sent until then lands until LATE_S later."""

    node: str
    incarnation: int
    replica: ReplicaRef
    write_by: float
    ends: float
    """At the metadata server: from then on it is refused."""
    over: bool = False
    """Committed, refused or given back, as far as its writer knows."""


@dataclass(eq=False)
class Read:
    """A reader's claim, under a name. `until`: as far as the reader knows, on the safe side."""

    node: str
    incarnation: int
    name: int
    lease_id: int
    replicas: list[ReplicaRef]
    until: float


class LeaseMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.now = 0.0
        self.state = new_state(limits=IndexLimits(max_given_back=64), retire_grace_s=GRACE_S, low_watermark=0.5)
        self.incarnations = dict.fromkeys(NODES, 0)
        self.memory: dict[tuple[str, int], int] = {}
        self.grants: list[Grant] = []
        self.reads: list[Read] = []
        self.delayed: list[tuple[str, int, list[int], int]] = []
        self.gone_names: set[int] = set()
        self.names = 0
        for node in NODES:
            self.start(node)

    # --- nodes ---

    @rule(node=NODE, alive_too=SELDOM)
    def starts(self, node, alive_too):
        """With its segment goes all that lay there: a machine whose nodes do little else sees nothing."""
        if alive_too or not self.alive(node):
            self.start(node)

    def start(self, node):
        """A new process of the node. One that it replaces may go on writing for a while: nobody is sure of its end."""
        self.incarnations[node] += 1
        self.state.register(registration(node, units=3, incarnation=self.incarnations[node]), self.now)
        self.reads = [read for read in self.reads if read.node != node]

    @rule(node=NODE, leaves=SELDOM)
    def leave(self, node, leaves):
        if not leaves:
            return
        self.state.leave(LeaveRequest(node_id=node, incarnation=self.incarnations[node]), self.now)
        self.holds_nothing(node)

    @rule(node=NODE)
    def engine_dies(self, node):
        """The node service has seen its end: nothing more is written but what was on its way."""
        incarnation = self.incarnations[node]
        self.state.release_writer(ReleaseWriterRequest(node_id=node, incarnation=incarnation), self.now)
        self.holds_nothing(node)
        self.reads = [read for read in self.reads if read.node != node]
        for grant in self.grants:
            if (grant.node, grant.incarnation) == (node, incarnation):
                grant.write_by, grant.over = min(grant.write_by, self.now), True

    @rule(seconds=st.sampled_from([0.4, 1.0, 4.0]), silent=st.sampled_from([(), (), (), ("a",)]))
    def time_passes(self, seconds, silent):
        """Silent nodes are not heard by the metadata server; each other they reach."""
        self.now += seconds
        for node in NODES:
            if node not in silent:
                self.state.heartbeat(HeartbeatRequest(node_id=node, incarnation=self.incarnations[node]), self.now)
        self.state.tick(self.now)
        self.reads = [read for read in self.reads if read.until > self.now]
        self.grants = [grant for grant in self.grants if self.now < grant.write_by + LATE_S or not grant.over]

    def holds_nothing(self, node: str) -> None:
        """What died with its holder has ended at once, not when its time is up."""
        assert not self.state._reading.leases.of_holder(node)
        assert not any(grant.node_id == node for grant, _ in self.state._reservations.open_grants())

    def alive(self, node: str) -> bool:
        return self.state._nodes.get(node, self.incarnations[node]) is not None

    def heard(self, read: Read) -> bool:
        """Whether the reader still counts as alive."""
        return self.alive(read.node) and self.incarnations[read.node] == read.incarnation

    # --- writers ---

    @rule(node=NODE, numbers=NUMBERS, prefer=NODE, ttl_s=st.sampled_from([1.0, 8.0]))
    def reserve(self, node, numbers, prefer, ttl_s):
        wish = f"{prefer}.{self.incarnations[prefer]:x}"
        request = reservation(node, numbers, prefer=wish, incarnation=self.incarnations[node], ttl_s=ttl_s)
        for replica in granted(self.state.reserve(request, self.now)):
            write_by, ends = self.now + WRITABLE * ttl_s, self.now + ttl_s
            self.grants.append(Grant(node, self.incarnations[node], replica, write_by, ends))

    @rule(node=NODE, numbers=NUMBERS, prefer=NODE)
    def put(self, node, numbers, prefer):
        """As almost always: reserved, written and committed in a moment."""
        before = len(self.grants)
        self.reserve(node, numbers, prefer, 8.0)
        for grant in self.grants[before:]:
            self.land(grant)
            self.end(grant)

    @rule(numbers=NUMBERS)
    def one_that_is_not_heard_writes_on(self, numbers):
        """It has lost its lease and does not know it: it reaches the other node, whose segment is wanted meanwhile."""
        before = len(self.grants)
        self.reserve("a", numbers, "b", 8.0)
        claimed = self.grants[before:]
        for seconds in (4.0, 1.4, 1.0):
            self.time_passes(seconds, ("a",))
        for wanted in range(KEYS):
            self.put("b", [wanted], "b")
        for grant in claimed:
            self.land(grant)

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def write(self, data):
        """In time, or what was sent in time lands late."""
        self.land(data.draw(st.sampled_from(self.grants)))

    def land(self, grant):
        if self.now < grant.write_by + LATE_S:
            for unit in units(grant.replica):
                self.memory[unit] = grant.replica.generation

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def commit(self, data):
        """Of what it wrote in full, however late. What is refused is not stored, and the writer is told why."""
        self.end(data.draw(st.sampled_from(self.grants)))

    def end(self, grant):
        written = all(self.memory.get(unit) == grant.replica.generation for unit in units(grant.replica))
        if not written or grant.over:
            return
        reply = self.state.commit(ids(grant.node, [grant.replica], grant.incarnation), self.now)
        known = self.state._nodes.get(grant.node, grant.incarnation) is not None
        if reply.committed == [False]:
            assert reply.refusals == [CommitRefusal.ENDED if known else CommitRefusal.WRITER_GONE]
        else:
            assert known and self.now < grant.ends
        grant.write_by, grant.over = -LATE_S, True  # all of it has landed

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def give_up(self, data):
        """The write has ended in an error, or its request was cancelled."""
        grant = data.draw(st.sampled_from(self.grants))
        if not grant.over:
            self.state.abort(ids(grant.node, [grant.replica], grant.incarnation), self.now)
            grant.write_by, grant.over = min(grant.write_by, self.now), True

    # --- readers ---

    @rule(node=NODE, numbers=NUMBERS, fate=st.sampled_from(["seen", "seen", "lost", "late", "looks"]))
    def match(self, node, numbers, fate):
        """`lost`: the reply does not come, so its lease is given back unseen; `late`: so does the request."""
        there = [number for number in range(KEYS) if self.state.complete_prefix([key(number)], self.now)]
        numbers = (there or numbers)[:4]
        if not there:  # most of what there is to get wrong begins with a reader that holds something
            self.put(node, numbers, node)
            there = [number for number in range(KEYS) if self.state.complete_prefix([key(number)], self.now)]
            numbers = there[:4] or numbers
        self.names += 1
        name, incarnation = self.names, self.incarnations[node]
        if fate == "late":
            self.state.release([], self.now, [name])
            self.gone_names.add(name)
            self.delayed.append((node, incarnation, numbers, name))
            return
        before = self.state.num_read_leases
        reply = self.ask(node, incarnation, numbers, name if fate != "looks" else 0, looks=fate == "looks")
        if fate == "looks":
            assert self.state.num_read_leases == before
        elif fate == "lost":
            self.state.release([], self.now, [name])
            assert self.state.num_read_leases == before
        elif reply.lease_id and self.alive(node):
            replicas = [replica for refs in reply.replicas for replica in refs]
            self.reads.append(Read(node, incarnation, name, reply.lease_id, replicas, self.now + LEASE_S))

    @rule(node=NODE, numbers=NUMBERS)
    def read(self, node, numbers):
        """As almost always."""
        self.match(node, numbers, "seen")

    def ask(self, node, incarnation, numbers, name, *, looks=False):
        return self.state.match(
            keys(*numbers),
            self.now,
            lease_s=0.0 if looks else LEASE_S,
            node_id=node,
            incarnation=incarnation,
            lease_name=name,
        )

    @precondition(lambda self: self.delayed)
    @rule()
    def a_late_request_arrives(self):
        before = self.state.num_read_leases
        assert self.ask(*self.delayed.pop(0)).lease_id == 0
        assert self.state.num_read_leases == before

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), lease_s=st.sampled_from([0.5, LEASE_S]))
    def renew(self, data, lease_s):
        """Bytes still move. No renewal makes a lease shorter."""
        read = data.draw(st.sampled_from(self.reads))
        if self.renewed(read, read.node, read.incarnation, lease_s):
            read.until = max(read.until, self.now + lease_s)
        else:
            assert not self.heard(read), "a lease of a live reader ends with its time alone"
            self.reads.remove(read)

    def renewed(self, read, node, incarnation, lease_s):
        request = RenewRequest(node_id=node, incarnation=incarnation, lease_ids=[read.lease_id], lease_s=lease_s)
        (done,) = self.state.renew(request, self.now).renewed
        return done

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), later=st.booleans())
    def somebody_else_renews(self, data, later):
        """Another node, or another start of the same: it holds no such lease, and none gets longer by it."""
        read = data.draw(st.sampled_from(self.reads))
        other = NODES[1 - NODES.index(read.node)]
        who = (other, self.incarnations[other]) if later else (read.node, read.incarnation - 1)
        assert not self.renewed(read, *who, 100.0)

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), commits=st.booleans())
    def somebody_else_ends_a_reservation(self, data, commits):
        """It is its writer's to commit and to give back."""
        grant = data.draw(st.sampled_from(self.grants))
        other = NODES[1 - NODES.index(grant.node)]
        claim, before = ids(other, [grant.replica], self.incarnations[other]), self.state.num_reservations
        if commits:
            assert self.state.commit(claim, self.now).committed == [False]
        else:
            self.state.abort(claim, self.now)
        assert self.state.num_reservations == before

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), by_name=st.booleans())
    def release(self, data, by_name):
        read = data.draw(st.sampled_from(self.reads))
        self.reads.remove(read)
        if by_name:
            self.state.release([], self.now, [read.name])
        else:
            self.state.release([read.lease_id], self.now)
        assert read.lease_id not in self.state._reading.leases

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def quarantine(self, data):
        """By another reader, for whatever reason."""
        bad = data.draw(st.sampled_from(data.draw(st.sampled_from(self.reads)).replicas))
        item = QuarantineItem(replica=bad, reason=QuarantineReason.CHECKSUM)
        self.state.quarantine(QuarantineRequest(items=[item]), self.now)

    # --- what holds ---

    @invariant()
    def who_reads_under_a_lease_meets_no_other_chunks_bytes(self):
        for read in self.reads:
            if not self.heard(read):
                continue  # it was given up, and reads on at its own risk: it verifies
            for replica in read.replicas:
                if replica.segment_id in self.state._nodes.segments:
                    for unit in units(replica):
                        assert self.memory[unit] == replica.generation, replica

    @invariant()
    def what_is_complete_is_what_was_written(self):
        index = self.state._index
        for stored in index.complete:
            for replica in index.refs(index.rows(stored)):
                for unit in units(replica):
                    assert self.memory[unit] == replica.generation, replica

    @invariant()
    def it_fits_together(self):
        self.state.check_invariants(self.now)
        assert all(read.lease_id in self.state._reading.leases for read in self.reads if self.heard(read))
        assert not self.gone_names & self.state._reading.leases._by_name.keys()
        timed = {what for expiry, what in self.state._deadlines._at if expiry is Expiry.READ_LEASE}
        assert timed == self.state._reading.leases._leases.keys(), "each lease has a time, and nothing else has"

    def teardown(self):
        """Whatever became of the clients, nothing is held when all times are over."""
        self.state.check_invariants(self.now + 100.0)
        stats = self.state.stats(self.now + 100.0, 0)
        assert (stats.read_leases, stats.reservations, stats.nodes) == (0, 0, [])
        assert self.state._reading.leases._by_name == {}


def units(replica: ReplicaRef) -> list[tuple[str, int]]:
    return [(replica.segment_id, at) for at in range(replica.offset, replica.offset + replica.length, UNIT)]


class ManyLeasesMachine(LeaseMachine):
    """The same for longer."""


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = machine_settings(12)
TestManyLeasesMachine = pytest.mark.slow(ManyLeasesMachine.TestCase)
TestManyLeasesMachine.settings = machine_settings(150)
