"""The decode legs of one request that are under way: which completions each serves, and what it may be waiting for.

State and what follows from it alone; `router.requests.ledger` decides when one starts and what its failure means.
"""

from collections.abc import Iterable
from typing import Protocol

import msgspec

from nodeapi.messages import LegInfo
from router.requests.completions import Completions
from router.requests.events import CancelLeg, DecodeFailed, KVSource, StartDecode
from router.requests.states import LEG_TRANSITIONS, LegState


class DecodeLeg(msgspec.Struct):
    """A decode leg under way. `index` None: it serves all completions; else that one, as its index 0. `open`: those
    that it has not ended yet. `source`: the prefill leg whose KV it fetches itself. `fingerprint`: of its engine, as
    its node last reported or, once it has spoken, as it says itself."""

    id: str
    node: str
    index: int | None
    open: set[int]
    source: KVSource | None
    state: LegState
    fingerprint: bytes
    followers: set[int] = set()
    """Indices whose legs start once this one has spoken."""

    @property
    def indices(self) -> set[int]:
        """The completions that depend on it."""
        return self.open | self.followers

    @property
    def awaits_kv(self) -> bool:
        """Whether it may still be waiting for what a prefill leg computes."""
        return self.state is LegState.AWAITING_KV

    @property
    def fetches(self) -> bool:
        """Whether it may still be waiting for KV from its prefiller."""
        return self.source is not None and self.awaits_kv

    def speak(self, info: LegInfo | None) -> None:
        """A delta has come, with this info: it streams."""
        if self.state is not LegState.STREAMING:
            self.set_state(LegState.STREAMING)
        if info is not None and info.fingerprint:
            self.fingerprint = info.fingerprint

    def set_state(self, state: LegState) -> None:
        """Streaming stays streaming; any other change must be in the table."""
        assert state is self.state or state in LEG_TRANSITIONS[self.state], f"{self.id}: {self.state} to {state}"
        self.state = state


class LegNames:
    """New ids for the legs of one request."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._last = 0

    def prefill(self) -> str:
        """Of its next prefill leg."""
        self._last += 1
        return f"{self._request_id}.p{self._last}"

    def decode(self) -> str:
        """Of its next decode leg."""
        self._last += 1
        return f"{self._request_id}.d{self._last}"


class _Fingerprints(Protocol):
    def fingerprint(self, node: str) -> bytes:
        """Of a node's engine, as last reported."""
        ...


class DecodeLegs:
    """All of one request."""

    def __init__(self, completions: Completions, names: LegNames, fingerprints: _Fingerprints) -> None:
        self._completions = completions
        self._names = names
        self._fingerprints = fingerprints
        self.running: dict[str, DecodeLeg] = {}
        """By leg id."""

    def failed(self, event: DecodeFailed) -> DecodeLeg | None:
        """The leg, if it is under way: it is still to be removed."""
        leg = self.running.get(event.leg)
        if leg is not None and event.lost:
            self._completions.untry(leg.open)
        return leg

    def remove(self, leg: DecodeLeg) -> None:
        """It has ended."""
        leg.set_state(LegState.ENDED)
        del self.running[leg.id]

    def cancel(self, leg: DecodeLeg) -> CancelLeg:
        """End it by our own hand."""
        self.remove(leg)
        return CancelLeg(leg.id, leg.node)

    def cancel_all(self) -> list[CancelLeg]:
        """End each."""
        return [self.cancel(leg) for leg in list(self.running.values())]

    @property
    def awaiting_kv(self) -> list[DecodeLeg]:
        """Those that may still be waiting for what a prefill leg computes."""
        return [leg for leg in self.running.values() if leg.awaits_kv]

    def start(
        self, node: str, indices: set[int], *, source: KVSource | None = None, handoff: bool = False
    ) -> list[StartDecode]:
        """Start what serves these completions on `node`. There are three ways:

        1. One leg for all, where none has a token yet. A fetched KV serves one sequence only, so that then n must be 1.
        2. Without a source, one leg each, as each continues after tokens of its own.
        3. With a source, one leg for the first, which fetches. The others start when it has spoken: they find its KV in
           the decoder's own prefix cache.
        """
        everything = len(indices) == len(self._completions)
        if everything and (len(indices) == 1 or not (self._completions.num_tokens or source)):
            return [self._start(node, None, indices, source, handoff)]
        first, *others = sorted(indices)
        if source is None:
            return [self._start(node, index, {index}, None, handoff) for index in (first, *others)]
        start = self._start(node, first, {first}, source, handoff)
        self.running[start.leg].followers.update(others)
        return [start]

    def stop(self, index: int, *, handoff: bool) -> list[CancelLeg | StartDecode]:
        """This completion needs no more: its leg is cancelled once none of its indices is left, and those start that
        were to follow it."""
        actions: list[CancelLeg | StartDecode] = []
        for leg in [leg for leg in self.running.values() if index in leg.indices]:  # one, or none
            leg.followers.discard(index)
            if index in leg.open and leg.open.isdisjoint(self._completions.unfinished):
                actions.append(self.cancel(leg))
                if leg.followers:
                    actions += self.start(leg.node, leg.followers, handoff=handoff)
        return actions

    def check_invariants(self) -> set[int]:
        """Assert that a completion is served by one leg; returns those that are."""
        served = [index for leg in self.running.values() for index in leg.indices]
        assert len(served) == len(set(served)), "an index is served by one leg"
        return set(served)

    def _start(
        self, node: str, index: int | None, indices: Iterable[int], source: KVSource | None, handoff: bool
    ) -> StartDecode:
        for each in indices:
            self._completions[each].tries += 1
        waits = handoff or source is not None
        state = LegState.AWAITING_KV if waits else LegState.COMPUTING
        fingerprint = self._fingerprints.fingerprint(node)
        leg = DecodeLeg(self._names.decode(), node, index, set(indices), source, state, fingerprint)
        self.running[leg.id] = leg
        return StartDecode(leg.id, node, handoff, index, tuple(self._completions[index or 0].tokens), source)
