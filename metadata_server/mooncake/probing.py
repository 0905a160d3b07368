"""Liveness by probes: asks the ports of all owners, in turn, and removes the records of those that are dead."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from kvcore.clock import Clock
from kvcore.config.mooncake_metadata import MooncakeMetadataConfig
from kvcore.errors import OverloadedError, RecordsUnavailableError
from kvcore.telemetry import log_fields
from metadata_server.mooncake.keys import MARK, Address, address_of, owned
from metadata_server.mooncake.limits import DialectLimits
from metadata_server.mooncake.owners import NameVerdict, OwnerWatch, ProbeOutcome
from metadata_server.mooncake.store import DialectListing, DialectStore
from metadata_server.records.base import Record

Probe = Callable[[Address, float], Awaitable[ProbeOutcome]]
_logger = logging.getLogger("metadata_server")
_WHY = {
    NameVerdict.HELD: "a live client at {} has this name",
    NameVerdict.UNREACHED: "the client at {} that has this name has never answered the metadata server: open its port,"
    " or DELETE this key",
    NameVerdict.SILENT: "the client at {} that has this name is silent: try again in some seconds",
}


class ProbeLiveness:
    """`Liveness` for clients whose ports can be reached from here."""

    def __init__(
        self,
        store: DialectStore,
        clock: Clock,
        config: MooncakeMetadataConfig,
        probe: Probe,
        limits: DialectLimits = DialectLimits(),
    ) -> None:
        self._store = store
        self._clock = clock
        self._probe = probe
        self._limits = limits
        self._watch = OwnerWatch(config.every_s, config.misses, config.silent_s, limits)

    def __repr__(self) -> str:
        return f"<ProbeLiveness {self._watch}>"

    async def run(self) -> None:
        """See Liveness."""
        while True:
            await self.look()
            await asyncio.sleep(self._limits.pulse_s)

    async def look(self) -> None:
        """Ask whom it is time to ask, and remove the dead."""
        due = list(self._watch.due(self._clock.now()))
        async with asyncio.TaskGroup() as probes:
            for key, address, revision in due:
                probes.create_task(self._ask(key, address, revision))
        for key in self._watch.dead():
            dead = self._watch.death(key)
            if dead is None:  # it has registered again since
                continue
            try:
                gone = await self._store.remove_owner(key, dead.revision)
            except (RecordsUnavailableError, OverloadedError):
                return  # when they can be written again
            self._watch.forget(key, dead.revision)
            if gone:
                fields = {"keys": ",".join(gone), "at": dead.address, "reason": dead.reason}
                log_fields(_logger, logging.INFO, "mooncake_owner_removed", **fields)

    async def _ask(self, key: str, address: Address, revision: int) -> None:
        superseded = self._watch.superseded(key)  # another one would answer
        outcome = ProbeOutcome.REFUSED if superseded else await self._probe(address, self._limits.probe_s)
        if self._watch.observe(key, revision, outcome, self._clock.now()):
            try:
                await self._store.has_answered(key, revision)
            except (RecordsUnavailableError, OverloadedError):
                log_fields(_logger, logging.WARNING, "mooncake_answer_unwritten", key=key)

    def found(self, listing: DialectListing) -> None:
        """See Liveness."""
        now, kept = self._clock.now(), set()
        for key, record in listing.values.items():
            registration, memory = owned(key) or ("", "")
            address = address_of(key, record.value)
            if address is None or (key == memory and registration in listing.values):
                continue  # nobody's; or registered, and asked there
            kept.add(key)
            answered = listing.answered.get(key) == record.revision
            self._watch.add(key, address, record.revision, now, answered=answered)
        self._watch.keep(kept, listing.revision, now)

    def wrote(self, key: str, value: bytes, revision: int) -> None:
        """See Liveness."""
        if MARK not in key:  # as most writes are
            return
        registration, memory = owned(key) or ("", "")
        address = address_of(key, value)
        if key == registration and address is not None:
            now = self._clock.now()
            if not self._watch.add(key, address, revision, now):
                self._watch.renew(key, now)
            self._watch.forget(memory)

    def removed(self, key: str) -> None:
        """See Liveness."""
        self._watch.forget(key)

    def unjudged(self, listing: DialectListing) -> dict[str, Record]:
        """See Liveness."""
        return {
            key: record
            for key, record in listing.values.items()
            if (mine := owned(key)) is not None
            and key == mine[1]
            and mine[0] not in listing.values
            and address_of(key, record.value) is None
        }

    async def holder(self, key: str, record: Record) -> str | None:
        """See Liveness."""
        address = address_of(key, record.value)
        if address is None:
            return "it is there already, and its value does not say where its owner listens"
        deadline = self._clock.now() + self._limits.settle_s
        while True:
            outcome = await self._probe(address, self._limits.probe_s)
            now = self._clock.now()
            verdict = self._watch.verdict(key, record.revision, outcome, now)
            if verdict is NameVerdict.FREE or (verdict is NameVerdict.YOUNG and now >= deadline):
                return None
            if verdict is not NameVerdict.YOUNG:
                return _WHY[verdict].format(address)
            await asyncio.sleep(self._limits.again_s)

    async def lender(self, key: str, record: Record, address: Address) -> str | None:
        """See Liveness."""
        alive = await self._probe(address, self._limits.probe_s) is ProbeOutcome.ANSWERED
        return f"a live client lends its memory under this name at {address}" if alive else None
