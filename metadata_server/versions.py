"""Which versions of the protocol a program speaks, how it says so, and whether two programs understand each other.

The rules are in docs/wire-formats.md ("Versions"). Version 1 is not said: a message without the fields speaks it. Where
several servers share the index, a greeting also says which partition of which set its sender is, or means to speak to:
those who know another set must do nothing together, as they would look for a chunk at different servers.
"""

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from kvcore.errors import MetadataProtocolError
from kvcore.partitions import Part, Partitions


@dataclass(frozen=True, slots=True)
class Protocols:
    """All versions from `oldest` to `newest`."""

    oldest: int
    newest: int
    part: Part | None = None
    """Of the index; None: it is one server's."""

    def greet(self, message: "_G") -> "_G":
        """The message, which now says what its sender speaks."""
        if self.newest == 1:
            return message
        message = msgspec.structs.replace(message, protocol=self.newest, oldest_protocol=self.oldest)
        if self.part is None:
            return message
        return msgspec.structs.replace(message, partition=self.part.number, partitions=list(self.part.whole.names))

    def common(self, theirs: "Protocols", *, us: str, them: str) -> int:
        """The newest version that both speak. Raises MetadataProtocolError that names both sides and their versions, or
        the partitions that they know."""
        version = min(self.newest, theirs.newest)
        if version < max(self.oldest, theirs.oldest):
            raise MetadataProtocolError(
                f"{them} speaks version {theirs} of the metadata protocol, {us} speaks {self}: "
                f"upgrade {us if self.newest < theirs.newest else them}",
                param="protocol",
            )
        if (why := self.why_apart(theirs, us=us, them=them)) is not None:
            raise MetadataProtocolError(why, param="partitions")
        return version

    def why_apart(self, theirs: "Protocols", *, us: str, them: str) -> str | None:
        """Why the two must do nothing together though their versions fit; None: they may."""
        ours = self.part
        if ours == theirs.part:
            return None
        if ours is not None and theirs.part is not None and ours.whole == theirs.part.whole:
            return f"{them} is at partition {theirs.part.name} of the index, {us} at {ours.name}: correct the addresses"
        return f"{them} was started with {_shown(theirs.part)}, {us} with {_shown(ours)}: start all with one file"

    def numbering(self, first: int) -> tuple[int, int]:
        """(first, step) of what a server numbers from about `first` on: of several partitions each has the numbers of
        one remainder, so that nobody has to be told whose a number is."""
        if self.part is None:
            return first, 1
        count = self.part.count
        return first + (self.part.number - first) % count, count

    def __str__(self) -> str:
        return str(self.newest) if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


def _shown(part: Part | None) -> str:
    return "an index of one server" if part is None else f"an index of partitions {part.whole}"


SPOKEN = Protocols(oldest=1, newest=7)
"""By this program."""


class VersionedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of the messages that say what their sender speaks."""

    protocol: int | msgspec.UnsetType = msgspec.UNSET
    """The newest version. Absent: 1."""
    oldest_protocol: int | msgspec.UnsetType = msgspec.UNSET
    """Absent: 1."""
    partitions: list[str] | msgspec.UnsetType = msgspec.UNSET
    """Of the index, by name, in the cluster file's order. Absent: it is one server's. Since version PARTITIONS."""
    partition: int | msgspec.UnsetType = msgspec.UNSET
    """Which of them the server is, counted from 0."""

    @property
    def spoken(self) -> Protocols:
        """What the sender speaks, and of which partition."""
        oldest = self.oldest_protocol if isinstance(self.oldest_protocol, int) else 1
        part = None
        names, number = self.partitions or [], self.partition or 0
        if 0 <= number < len(names):
            part = Part(Partitions(tuple(names)), number)
        return Protocols(oldest=oldest, newest=self.protocol if isinstance(self.protocol, int) else 1, part=part)


class TermReply(msgspec.Struct, frozen=True, kw_only=True):
    """A reply that gives something for some time, or says that its sender knows a node. Callers take none whose token
    is less than one that they have seen: its sender was replaced since."""

    token: int = 0
    """Of the leader's term; 0: there is one metadata server."""


class VersionedTermReply(VersionedMessage, frozen=True, kw_only=True):
    """A TermReply that says what its sender speaks."""

    token: int = 0
    """As of a TermReply."""


_G = TypeVar("_G", bound=VersionedMessage)
