"""What the rest of a metadata server knows of the election. Pure."""

from typing import Protocol


class Leader(Protocol):
    """Says whether this server leads."""

    @property
    def leads(self) -> bool:
        """Now."""
        ...

    def check(self) -> None:
        """Raise NotLeaderError unless it does."""
        ...


class OnlyServer:
    """Where there are no others."""

    leads = True

    def check(self) -> None:
        """Nothing is wrong."""
