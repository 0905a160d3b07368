"""Who of the owners is alive, as far as probes of their ports can tell. Pure: outcomes in, verdicts out.

Invariants: an owner whose port has answered since it was last refused or silent is never dead; nor is one whose port
has never answered us, as it may be a firewall that refuses. A port that refuses is a machine that is up without the
client. One that is silent may be cut off from us: its name may be taken after some misses, but its records stay for
`silent_s`, of which only the time counts in which we heard from another machine. A port has one owner: whoever
registered it last.
"""

from collections.abc import Iterator
from enum import Enum, auto

import msgspec

from metadata_server.mooncake.keys import Address
from metadata_server.mooncake.limits import DialectLimits


class ProbeOutcome(Enum):
    """What a port said."""

    ANSWERED = auto()
    """It took the connection."""
    REFUSED = auto()
    """Its machine says that nobody listens there."""
    SILENT = auto()
    """Nothing came back, or nobody knows the machine."""
    UNKNOWN = auto()
    """We could not ask: the fault is ours."""


class NameVerdict(Enum):
    """Whether another client may have a name."""

    HELD = auto()
    UNREACHED = auto()
    """Held, as its port has never answered us: nobody can tell."""
    SILENT = auto()
    """Held for now: it does not answer."""
    YOUNG = auto()
    """It may not listen yet: ask again."""
    FREE = auto()


class DeadOwner(msgspec.Struct, frozen=True):
    """An owner whose records are to go, if its registration is still at this revision."""

    revision: int
    address: Address
    reason: str


class _Owner(msgspec.Struct):
    address: Address
    revision: int
    since: float
    answered: bool
    next_at: float
    pause_s: float
    refusals: int = 0
    """Since it last answered."""
    silences: int = 0
    """In a row."""
    silent_s: float = 0.0
    probed_at: float = 0.0


class OwnerWatch:
    """By the key of each one's registration."""

    def __init__(self, every_s: float, misses: int, silent_s: float, limits: DialectLimits = DialectLimits()) -> None:
        self._every_s = every_s
        self._misses = misses
        self._silent_s = silent_s
        self._limits = limits
        self._owners: dict[str, _Owner] = {}
        self._newest: dict[Address, tuple[int, str]] = {}
        """Who registered an address last, and the revision."""
        self._heard: dict[str, float] = {}
        """When each host last answered or refused."""

    def __repr__(self) -> str:
        owners = self._owners.values()
        answered, dead = sum(owner.answered for owner in owners), len(self.dead())
        return f"<OwnerWatch {len(owners)} owners, {answered} have answered, {dead} are dead>"

    def __len__(self) -> int:
        return len(self._owners)

    # --- who there is -------------------------------------------------------------------------------------------

    def add(self, key: str, address: Address, revision: int, now: float, *, answered: bool = False) -> bool:
        """It has registered. False, and nothing changes: this revision, or a later one, is known already."""
        known = self._owners.get(key)
        if known is not None and known.revision >= revision:
            return False
        first_s = self._limits.first_probe_s
        self._owners[key] = _Owner(address, revision, now, answered, now + first_s, first_s)
        if self._newest.get(address, (0, ""))[0] < revision:
            self._newest[address] = revision, key
        return True

    def forget(self, key: str, revision: int | None = None) -> None:
        """Its registration is gone (if it is the one of this revision)."""
        if key not in self._owners or revision not in (None, self._owners[key].revision):
            return
        owner = self._owners.pop(key)
        if self._newest.get(owner.address) == (owner.revision, key):
            del self._newest[owner.address]

    def renew(self, key: str, now: float) -> None:
        """It has registered again just as it was: it may be another process, on the same port."""
        owner = self._owners.get(key)
        if owner is not None:
            owner.refusals, owner.silences, owner.silent_s = 0, 0, 0.0
            owner.since, owner.pause_s = now, self._limits.first_probe_s
            owner.next_at = now + owner.pause_s

    def keep(self, keys: set[str], revision: int, now: float) -> None:
        """Forget all others that had registered by this revision, and which hosts were heard long ago."""
        for key in self._owners.keys() - keys:
            if self._owners[key].revision <= revision:
                self.forget(key)
        long_ago = now - self._silent_s
        self._heard = {host: at for host, at in self._heard.items() if at > long_ago}

    # --- probes -------------------------------------------------------------------------------------------------

    def due(self, now: float) -> Iterator[tuple[str, Address, int]]:
        """Key, address and revision of whom to probe, those first that wait longest. Each is to be `observe`d."""
        late = sorted((owner.next_at, key) for key, owner in self._owners.items() if owner.next_at <= now)
        for _, key in late[: self._limits.probes_at_once]:
            yield key, self._owners[key].address, self._owners[key].revision

    def superseded(self, key: str) -> bool:
        """Another one has its port."""
        owner = self._owners.get(key)
        return owner is not None and self._newest.get(owner.address, (0, ""))[0] > owner.revision

    def observe(self, key: str, revision: int, outcome: ProbeOutcome, now: float) -> bool:
        """What its port said. True: it is the first time that it answered."""
        owner = self._owners.get(key)
        if owner is None or owner.revision != revision:
            return False
        if self.superseded(key):
            outcome, owner.answered = ProbeOutcome.REFUSED, True
        elif outcome in (ProbeOutcome.ANSWERED, ProbeOutcome.REFUSED):
            self._heard[owner.address.host] = now
        owner.pause_s = self._every_s if owner.answered else min(self._every_s, owner.pause_s * 2)
        owner.next_at = now + owner.pause_s
        since, owner.probed_at = owner.probed_at, now
        match outcome:
            case ProbeOutcome.ANSWERED:
                first, owner.answered = not owner.answered, True
                owner.refusals, owner.silences, owner.silent_s = 0, 0, 0.0
                owner.pause_s = self._every_s
                owner.next_at = now + owner.pause_s
                return first
            case ProbeOutcome.REFUSED:
                owner.refusals, owner.silences, owner.silent_s = owner.refusals + 1, 0, 0.0
            case ProbeOutcome.SILENT:
                owner.silences += 1
                if owner.silences > 1 and self._heard_others(owner.address.host, since):
                    owner.silent_s += now - since
            case ProbeOutcome.UNKNOWN:
                pass
        return False

    def dead(self) -> list[str]:
        """Whose records are to go."""
        return [key for key in self._owners if self.death(key) is not None]

    def death(self, key: str) -> DeadOwner | None:
        """None: it is not dead, as far as we know."""
        owner = self._owners.get(key)
        if owner is None or not owner.answered:
            return None
        if owner.refusals >= self._misses and not owner.silences:
            return DeadOwner(owner.revision, owner.address, "its port refuses")
        if owner.silences >= self._misses and owner.silent_s >= self._silent_s:
            return DeadOwner(owner.revision, owner.address, "it is silent")
        return None

    def verdict(self, key: str, revision: int, outcome: ProbeOutcome, now: float) -> NameVerdict:
        """Whether another client may have its name, as its port has just said `outcome`."""
        owner = self._owners.get(key)
        if owner is None or owner.revision != revision:
            return NameVerdict.HELD if outcome is not ProbeOutcome.REFUSED else NameVerdict.YOUNG
        if self.superseded(key):
            return NameVerdict.FREE
        match outcome:
            case ProbeOutcome.REFUSED if now - owner.since < self._limits.young_s:
                return NameVerdict.YOUNG
            case ProbeOutcome.REFUSED:
                return NameVerdict.FREE if owner.answered else NameVerdict.UNREACHED
            case ProbeOutcome.SILENT if owner.answered and owner.silences >= self._misses:
                return NameVerdict.FREE
            case ProbeOutcome.SILENT:
                return NameVerdict.SILENT
            case _:
                return NameVerdict.HELD

    def _heard_others(self, host: str, since: float) -> bool:
        return any(other != host and at >= since for other, at in self._heard.items())
