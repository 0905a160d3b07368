"""Two or three metadata servers that share the index answer as one does, call after call of the same history."""

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from support.metadata_rigs import DirectTransport
from support.metadata_words import granted, ids, keys, new_state, registration, reservation
from support.partition_rigs import PartitionRig
from support.slow import slow_but

from kvcore.types import ReplicaRef
from metadata_server.cache_messages import ReleaseRequest, RenewRequest
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.messages import (
    FindHoldersRequest,
    MatchReply,
    MatchRequest,
    QuarantineItem,
    QuarantineReason,
    QuarantineRequest,
    TellHoldingsRequest,
    WaitRequest,
)

NODES, POOL, STEPS = ("m", "n"), range(0, 256, 21), 60


class Alike:
    """`one`: an index of one server; `rig`: the same over several. There is always room, and nothing runs out; of a
    chunk one replica at a time is written, as whoever is told that it is complete is not told who writes it again."""

    def __init__(self, seed: int, names: tuple[str, ...]) -> None:
        self.dice, self.happened = random.Random(seed), Counter[str]()
        self.loop = asyncio.new_event_loop()
        self.rig = PartitionRig(names, max_replicas=1)
        self.core = MetadataCore(new_state(max_replicas=1), self.rig.clock)
        self.one = MetadataClient(DirectTransport(self.core), self.rig.clock, 5.0)
        self.prompts = [self.dice.sample(POOL, len(POOL)) for _ in range(3)]
        self.reserved: list[tuple[str, ReplicaRef, ReplicaRef]] = []
        self.leases: list[tuple[str, int, int]] = []
        for node in NODES:
            self.run(self.one.register(registration(node, 8 * len(POOL))))
            self.run(self.rig.register(node, 8 * len(POOL)))

    def steps(self) -> None:
        """Whatever comes, and what is held after each."""
        rules = [
            *(self.reserve,) * 6,
            *(self.commit,) * 6,
            *(self.match,) * 6,
            *(self.wait,) * 3,
            *(self.abort, self.renew, self.release, self.evict, self.pin_and_unpin, self.quarantine),
            *(self.tell_holdings, self.find_holders),
        ]
        for _ in range(STEPS):
            rule = self.dice.choice(rules)
            self.happened[rule.__name__] += 1
            rule()
            self.check_held()

    def prompt(self) -> list[int]:
        """The beginning of one, perhaps with a chunk left out."""
        numbers = self.dice.choice(self.prompts)[: self.dice.randint(0, len(POOL))]
        if numbers and self.dice.random() < 0.3:
            numbers = [number for number in numbers if number != self.dice.choice(numbers)]
        return numbers

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    def both(self, ask: Any) -> tuple[Any, Any]:
        return self.run(ask(self.one)), self.run(ask(self.rig.client))

    def settle(self):
        """What is given back behind the callers' backs is."""

        async def settled():
            await asyncio.gather(*self.rig.client._background)

        self.run(settled())

    def reserve(self):
        node, numbers = self.dice.choice(NODES), self.prompt()
        one, several = self.both(lambda client: client.reserve(reservation(node, numbers)))
        assert [(o.status, o.writers) for o in one.outcomes] == [(o.status, o.writers) for o in several.outcomes]
        assert {segment.id for segment in one.segments} == {segment.id for segment in several.segments}
        for a, b in zip(granted(one), granted(several), strict=True):
            assert (a.key, a.length, a.segment_id) == (b.key, b.length, b.segment_id)
            self.reserved.append((node, a, b))

    def taken(self, node: str, most: int) -> tuple[list[ReplicaRef], list[ReplicaRef]]:
        """Some of what the node has reserved last, at both."""
        own = [(a, b) for of, a, b in self.reserved if of == node][-2 * most :]
        chosen = own if self.dice.random() < 0.7 else self.dice.sample(own, min(len(own), self.dice.randint(1, most)))
        return [a for a, _ in chosen], [b for _, b in chosen]

    def commit(self):
        node = self.dice.choice(NODES)
        ours, theirs = self.taken(node, len(POOL))
        one = self.run(self.one.commit(ids(node, ours)))
        assert one == self.run(self.rig.client.commit(ids(node, theirs)))

    def abort(self):
        node = self.dice.choice(NODES)
        ours, theirs = self.taken(node, 2)
        self.run(self.one.abort(ids(node, ours)))
        self.run(self.rig.client.abort(ids(node, theirs)))

    def same(self, one: MatchReply, several: MatchReply) -> None:
        """But for offsets and numbers."""
        where = [
            [[(ref.key, ref.segment_id, ref.length) for ref in refs] for refs in reply.replicas]
            for reply in (one, several)
        ]
        assert where[0] == where[1]
        assert {segment.id for segment in one.segments} == {segment.id for segment in several.segments}
        assert (one.writers, one.num_writing, one.rebuilding) == (
            several.writers,
            several.num_writing,
            several.rebuilding,
        )
        assert bool(one.lease_id) == bool(several.lease_id)

    def match(self):
        node, numbers, leased = self.dice.choice(NODES), self.prompt(), self.dice.random() < 0.7
        held = {"lease_s": 60.0, "node_id": node, "incarnation": 1} if leased else {}
        one, several = self.both(lambda client: client.match(MatchRequest(keys=keys(*numbers), in_order=True, **held)))
        self.same(one, several)
        self.happened["found"] += len(one.replicas)
        self.happened["gaps"] += 0 < len(one.replicas) < len(numbers)
        self.happened["writing"] += one.num_writing
        if one.lease_id:
            self.happened["packed"] += several.lease_id >> 64 > 0
            self.leases.append((node, one.lease_id, several.lease_id))

    def wait(self):
        """For what is there already, or no longer than a moment."""
        numbers, more = self.prompt() or [POOL[0]], self.dice.randint(0, len(POOL))
        request = WaitRequest(keys=keys(*numbers), more_than=more, timeout_s=0.0)
        self.same(*self.both(lambda client: client.wait(request)))

    def renew(self):
        if self.leases:
            node, ours, theirs = self.dice.choice(self.leases)
            for client, lease in ((self.one, ours), (self.rig.client, theirs)):
                request = RenewRequest(node_id=node, incarnation=1, lease_ids=[lease], lease_s=60.0)
                assert self.run(client.renew(request)).renewed == [True]

    def release(self):
        """After that nobody holds anything, at either."""
        self.run(self.one.release(ReleaseRequest(lease_ids=[ours for _, ours, _ in self.leases])))
        self.run(self.rig.client.release(ReleaseRequest(lease_ids=[theirs for _, _, theirs in self.leases])))
        self.leases.clear()
        self.settle()
        assert [core.state.num_read_leases for core in (self.core, *self.rig.cores)] == [0] * (1 + len(self.rig.cores))

    def evict(self):
        """A lease may hold more in a partition than the prefix: nothing is compared while there is one."""
        numbers = self.prompt()
        self.release()
        one, several = self.both(lambda client: client.evict(keys(*numbers)))
        assert one == several

    def pin_and_unpin(self):
        numbers = self.prompt()
        one, several = self.both(lambda client: client.pin(keys(*numbers)))
        assert one == several
        one, several = self.both(lambda client: client.pins())
        assert {pin.key: pin.replicas for pin in one.pins} == {pin.key: pin.replicas for pin in several.pins}
        assert (one.num_pins, one.pinned_bytes) == (several.num_pins, several.pinned_bytes)
        one, several = self.both(lambda client: client.unpin(keys(*numbers)))
        assert one == several

    def quarantine(self):
        number = self.dice.choice(POOL)
        for client in (self.one, self.rig.client):
            found = self.run(client.match(MatchRequest(keys=keys(number)))).replicas
            items = [QuarantineItem(replica=ref, reason=QuarantineReason.STALE) for refs in found for ref in refs]
            self.run(client.quarantine(QuarantineRequest(items=items)))

    def tell_holdings(self):
        node, came, left, reset = self.dice.choice(NODES), self.prompt(), self.prompt(), self.dice.random() < 0.2
        request = TellHoldingsRequest(node_id=node, incarnation=1, added=keys(*came), removed=keys(*left), reset=reset)
        one, several = self.both(lambda client: client.tell_holdings(request))
        assert one == several

    def find_holders(self):
        numbers = self.prompt()
        one, several = self.both(lambda client: client.find_holders(FindHoldersRequest(keys=keys(*numbers))))
        named = [[{reply.nodes[at].id for at in having} for having in reply.holders] for reply in (one, several)]
        assert named[0] == named[1]

    def check_held(self) -> None:
        """Of both."""
        self.rig.check()
        self.core.state.check_invariants(self.rig.clock.now())
        one, several = self.both(lambda client: client.stats())
        assert (one.objects, one.reservations) == (several.objects, several.reservations)
        assert {node.id for node in one.nodes} == {node.id for node in several.nodes}
        use = [
            {each.segment.id: (each.used_bytes, each.reserved_bytes, each.num_replicas) for each in stats.segments}
            for stats in (one, several)
        ]
        assert use[0] == use[1]


def run_alike(seed: int, names: tuple[str, ...]) -> Counter[str]:
    """One history. Returns what happened in it."""
    alike = Alike(seed, names)
    try:
        alike.steps()
    finally:
        alike.loop.close()
    return alike.happened


@pytest.mark.parametrize("block", slow_but([0], range(6)))
def test_several_answer_as_one(block):
    happened = Counter[str]()
    for seed in range(block * 6, block * 6 + 6):
        for names in (("a", "b"), ("a", "b", "c")):
            happened += run_alike(seed, names)
    assert all(happened[what] > 10 for what in ("found", "gaps", "writing", "packed", "evict")), happened
