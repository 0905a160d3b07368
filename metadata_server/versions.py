"""Which versions of the protocol a program speaks, how it says so, and whether two programs understand each other.

The rules are in docs/wire-formats.md ("Versions"). Version 1 is not said: a message without the fields speaks it.
"""

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from kvcore.errors import MetadataProtocolError


@dataclass(frozen=True, slots=True)
class Protocols:
    """All versions from `oldest` to `newest`."""

    oldest: int
    newest: int

    def greet(self, message: "_G") -> "_G":
        """The message, which now says what its sender speaks."""
        if self.newest == 1:
            return message
        return msgspec.structs.replace(message, protocol=self.newest, oldest_protocol=self.oldest)

    def common(self, theirs: "Protocols", *, us: str, them: str) -> int:
        """The newest version that both speak. Raises MetadataProtocolError that names both sides and their versions."""
        version = min(self.newest, theirs.newest)
        if version < max(self.oldest, theirs.oldest):
            raise MetadataProtocolError(
                f"{them} speaks version {theirs} of the metadata protocol, {us} speaks {self}: "
                f"upgrade {us if self.newest < theirs.newest else them}",
                param="protocol",
            )
        return version

    def __str__(self) -> str:
        return str(self.newest) if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


SPOKEN = Protocols(oldest=1, newest=5)
"""By this program."""


class VersionedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of the messages that say what their sender speaks."""

    protocol: int | msgspec.UnsetType = msgspec.UNSET
    """The newest version. Absent: 1."""
    oldest_protocol: int | msgspec.UnsetType = msgspec.UNSET
    """Absent: 1."""

    @property
    def spoken(self) -> Protocols:
        """What the sender speaks."""
        oldest = self.oldest_protocol if isinstance(self.oldest_protocol, int) else 1
        return Protocols(oldest=oldest, newest=self.protocol if isinstance(self.protocol, int) else 1)


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
