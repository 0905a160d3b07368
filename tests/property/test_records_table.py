"""Records under any order of writes, flushes and failed flushes, beside a dict that knows what was flushed."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from metadata_server.records.base import PutOutcome
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.table import RecordsTable

KEYS = st.sampled_from(["a", "a/1", "a/2", "b"])


class TableMachine(RuleBasedStateMachine):
    """`flushed`: key -> (value, revision, lease), as readers must see it; `ahead`: as writers are judged by."""

    def __init__(self) -> None:
        super().__init__()
        self.table = RecordsTable((), {}, 0, RecordsLimits())
        self.flushed: dict[str, tuple[bytes, int, int]] = {}
        self.ahead = dict(self.flushed)
        self.leases: set[int] = set()
        self.leases_ahead: set[int] = set()
        self.flying = None
        self.at_cut: tuple[dict, set] = ({}, set())
        self.highest = 0
        self.next_lease = 1

    @rule(key=KEYS, value=st.binary(max_size=2), how=st.sampled_from(["any", "right", "wrong"]), leased=st.booleans())
    def put(self, key, value, how, leased):
        there = self.ahead.get(key, (b"", 0, 0))[1]
        lease = max(self.leases_ahead, default=99) if leased else 0
        expect = {"any": None, "right": there, "wrong": there + 1}[how]
        reply = self.table.put(key, value, expect, lease)
        if how == "wrong":
            assert reply.outcome is PutOutcome.CONFLICT
            assert (reply.record.revision if reply.record else 0) == there
        elif leased and not self.leases_ahead:
            assert reply.outcome is PutOutcome.LEASE_ENDED
        else:
            assert reply.outcome is PutOutcome.WRITTEN and reply.record.revision > self.highest
            self.highest = reply.record.revision
            self.ahead[key] = (value, self.highest, lease)

    @rule(key=KEYS, wrong=st.booleans())
    def delete(self, key, wrong):
        there = self.ahead.get(key)
        done = self.table.delete(key, there[1] + 1 if there and wrong else None)
        assert done == (there is not None and not wrong)
        if done:
            del self.ahead[key]

    @rule()
    def grant(self):
        self.table.grant(self.next_lease, 5.0)
        self.leases_ahead.add(self.next_lease)
        self.next_lease += 1

    @precondition(lambda self: self.leases_ahead)
    @rule()
    def revoke(self):
        lease = max(self.leases_ahead)
        self.table.revoke(lease)
        self.leases_ahead.discard(lease)
        self.ahead = {key: found for key, found in self.ahead.items() if found[2] != lease}

    @precondition(lambda self: self.flying is None)
    @rule()
    def cut(self):
        self.flying = self.table.cut()
        self.at_cut = dict(self.ahead), set(self.leases_ahead)

    @precondition(lambda self: self.flying is not None)
    @rule()
    def settle(self):
        self.table.settle(self.flying)
        self.flying = None
        self.flushed, self.leases = self.at_cut

    @precondition(lambda self: self.flying is not None)
    @rule()
    def drop(self):
        self.table.drop()
        self.flying = None
        self.ahead, self.leases_ahead = dict(self.flushed), set(self.leases)

    @invariant()
    def readers_see_what_was_flushed_and_nothing_else(self):
        for prefix in ("", "a/", "b"):
            found = {r.key: (r.value, r.revision, r.lease) for r in self.table.listing(prefix).records}
            assert found == {key: seen for key, seen in self.flushed.items() if key.startswith(prefix)}
            assert list(found) == sorted(found)
        assert set(self.table.leases) == self.leases
        assert all(self.table.get(key).revision == seen[1] for key, seen in self.flushed.items())
        assert len(self.table) == len(self.flushed)


TestRecordsTable = TableMachine.TestCase
TestRecordsTable.settings = settings(max_examples=25, deadline=None)
