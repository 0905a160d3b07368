"""What says whether the owner of a record is alive. Two ways: probes of its port (`probing`), time (`expiry`)."""

from typing import Protocol

from metadata_server.mooncake.keys import Address
from metadata_server.mooncake.store import DialectListing
from metadata_server.records.base import Record


class Liveness(Protocol):
    """Removes the records of the dead, and says who holds a name."""

    async def run(self) -> None:
        """Keep looking until cancelled."""
        ...

    def found(self, listing: DialectListing) -> None:
        """What there is: at the start, and again and again."""
        ...

    def wrote(self, key: str, value: bytes, revision: int) -> None:
        """It was written by its owner, or written again as it was."""
        ...

    def removed(self, key: str) -> None:
        """Its owner has removed it."""
        ...

    def unjudged(self, listing: DialectListing) -> dict[str, Record]:
        """Memory whose lender is not registered, and which stays until somebody deletes it: nobody could be asked."""
        ...

    async def holder(self, key: str, record: Record) -> str | None:
        """Why nobody else may have what was registered under `key`; None: its owner is dead."""
        ...

    async def lender(self, key: str, record: Record, address: Address) -> str | None:
        """The same of the memory under `key`, whose lender listens there."""
        ...
