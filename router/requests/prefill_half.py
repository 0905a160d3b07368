"""The prefill half of a request's ledger: its prefill leg, and what its end or failure means for decode legs that wait.

Pure, as the ledger is. Decode legs are started here only where they wait for a prefill leg; the ledger does the rest.
"""

from typing import Protocol

import msgspec

from kvcore.errors import KVFerryError
from kvcore.handoff import HandoffTraits
from nodeapi.messages import PrefillResult
from router.requests.completions import Completions
from router.requests.decode_legs import DecodeLegs, LegNames
from router.requests.events import Action, CancelLeg, EndHandoff, KVSource, RequestTimer, StartPrefill, StartTimer
from router.requests.limits import RequestLimits


class Picker(Protocol):
    """Chooses replacements among the nodes usable at this moment. Pure as far as the ledger is concerned."""

    def prefiller(self, decoder: str, exclude: frozenset[str]) -> str | None:
        """Another prefiller for this decoder."""
        ...

    def decoder(self, exclude: frozenset[str], fingerprint: bytes, full: frozenset[str]) -> str | None:
        """Another decoder, or in need a prefiller; one of this fingerprint, unless that is empty. `full`: those of
        `exclude` that only have no room."""
        ...

    def fingerprint(self, node: str) -> bytes:
        """Of the node's KV, as it last reported; empty: not known."""
        ...


class PrefillLeg(msgspec.Struct, frozen=True):
    """The prefill leg under way. `decoder`: whom it was started for."""

    id: str
    node: str
    decoder: str


class PrefillHalf:
    """At most one prefill leg at a time. `retries`: where a leg that is tried again is noted."""

    def __init__(
        self,
        completions: Completions,
        decodes: DecodeLegs,
        picker: Picker,
        names: LegNames,
        retries: list[tuple[str, str]],
        *,
        attempts: int,
        num_chunks: int,
        handoff: HandoffTraits,
        limits: RequestLimits,
    ) -> None:
        self._completions = completions
        self._decodes = decodes
        self._picker = picker
        self._names = names
        self._retries = retries
        self._attempts = attempts
        self._num_chunks = num_chunks
        self._handoff = handoff
        self._limits = limits
        self._tries = 0
        self._failed: set[str] = set()
        self._pause_s = limits.handoff_grace_s
        self.running: PrefillLeg | None = None
        self.awaited_by: str | None = None
        """The decoder, while no decode leg starts before the prefill leg has ended."""
        self.result: PrefillResult | None = None

    @property
    def saves(self) -> bool:
        """Whether a leg under way saves chunks for which a decode leg may wait in the store."""
        return self.running is not None and self._handoff.waits_in_store

    @property
    def source(self) -> KVSource | None:
        """The leg under way, where a decode leg beside it is told of it."""
        leg = self.running
        return KVSource(leg.id, leg.node) if leg is not None and self._handoff.decode_beside_prefill else None

    @property
    def saved_all(self) -> bool:
        """Whether there is no more to hand over than what lies there: no decoder need compute any of it."""
        return self.result is not None and self.result.stored_chunks >= self._num_chunks

    def saves_for(self, leg: str) -> str | None:
        """The decoder into whose segment this leg writes first, while it runs."""
        running = self.running
        return running.decoder if running is not None and running.id == leg and self.saves else None

    def is_awaited_by(self, leg: str) -> bool:
        """Whether this decode leg may be waiting for the leg under way."""
        return self.running is not None and any(one.id == leg for one in self._decodes.awaiting_kv)

    def start(self, node: str, decoder: str) -> list[Action]:
        """The first leg."""
        if self._handoff.decode_after_prefill:
            self.awaited_by = decoder
        return self._start(node, decoder)

    def cancel(self) -> list[Action]:
        """End the leg under way by our own hand; nobody awaits it any more."""
        leg, self.running, self.awaited_by = self.running, None, None
        return [CancelLeg(leg.id, leg.node)] if leg is not None else []

    def could_move(self, leg: str) -> bool:
        """Whether this leg is under way, and another prefiller would be tried if it failed."""
        running = self.running
        if running is None or running.id != leg or not self._completions.unfinished:
            return False
        return self._next_node(self._failed | {running.node}) is not None

    def stalled(self, leg: str, error: KVFerryError) -> list[Action]:
        """If this leg is under way and somebody waits for it: as `failed`. The decoder computes where no other
        prefiller is there."""
        running, awaited = self.running, self.awaited_by is not None or bool(self._decodes.awaiting_kv)
        if running is None or running.id != leg or not (awaited and self._completions.unfinished):
            return []
        return [CancelLeg(running.id, running.node), *self.failed(error)]

    def done(self, result: PrefillResult) -> list[Action]:
        """The leg under way ended. Four cases, while some completion is unfinished:

        1. No decode leg has started yet: they start, with what it answered.
        2. They fetch beside it: nothing is to be done.
        3. It stored less than there is to hand over: decode legs that wait need not wait for the rest.
        4. It stored everything: a decode leg that still waits after a moment is told so.
        """
        leg, self.running, self.result = self.running, None, result
        assert leg is not None
        if not self._completions.unfinished:
            return []
        if self.awaited_by is not None:
            params = result.handoff_params
            return self._start_awaiting(KVSource(leg.id, leg.node, params) if params else None)
        if not self._handoff.waits_in_store:
            return []
        if result.stored_chunks < self._num_chunks:
            return self.end_handoffs()
        if not self._decodes.awaiting_kv:
            return []
        return [StartTimer(RequestTimer.HANDOFF, self._limits.handoff_grace_s)]

    def failed(self, error: KVFerryError) -> list[Action]:
        """The leg under way failed. A new one starts if a decode leg would wait for it, the request is not to blame,
        and tries and a prefiller are left. Three cases, while some completion is unfinished:

        1. Decode legs fetch beside it: they start anew, with the new leg's KV or without.
        2. There is a new leg: decode legs wait for it, or start when it has ended.
        3. There is none: decode legs that wait are told to compute; those that have not started compute.
        """
        leg, self.running = self.running, None
        assert leg is not None
        if not self._completions.unfinished:
            return []
        self._failed.add(leg.node)
        again = self._retry(error)
        if self._handoff.decode_beside_prefill:
            return again + self._restart_fetching()
        if again:
            return again
        return self.end_handoffs() if self.awaited_by is None else self._start_awaiting(None)

    def end_handoffs(self) -> list[Action]:
        """Tell the legs that wait to stop waiting. This is repeated until they stream: the call may reach a node before
        the leg itself, and is ignored then."""
        actions: list[Action] = [EndHandoff(leg.id, leg.node) for leg in self._decodes.awaiting_kv]
        if actions:
            actions.append(StartTimer(RequestTimer.HANDOFF, self._pause_s))
            self._pause_s = min(2 * self._pause_s, self._limits.handoff_longest_s)
        return actions

    def _start(self, node: str, decoder: str) -> list[Action]:
        self._tries += 1
        self.running = leg = PrefillLeg(self._names.prefill(), node, decoder)
        return [StartPrefill(leg.id, node, decoder)]

    def _retry(self, error: KVFerryError) -> list[Action]:
        if not error.retryable or (found := self._next_node(self._failed)) is None:
            return []
        self._retries.append(("prefill", error.code))
        return self._start(*found)

    def _next_node(self, failed: set[str]) -> tuple[str, str] | None:
        """Another prefiller, and the decoder that would wait for it."""
        decoder = self.awaited_by or next((leg.node for leg in self._decodes.awaiting_kv), None)
        if decoder is None or self._tries >= self._attempts:
            return None
        node = self._picker.prefiller(decoder, frozenset(failed))
        return None if node is None else (node, decoder)

    def _start_awaiting(self, source: KVSource | None) -> list[Action]:
        node, self.awaited_by = self.awaited_by, None
        assert node is not None
        return list(self._decodes.start(node, self._completions.unfinished, source=source))

    def _restart_fetching(self) -> list[Action]:
        actions: list[Action] = []
        for leg in self._decodes.awaiting_kv:
            self._completions.untry(leg.open)  # it did not fail
            actions.append(self._decodes.cancel(leg))
            actions += self._decodes.start(leg.node, leg.indices, source=self.source)
        return actions
