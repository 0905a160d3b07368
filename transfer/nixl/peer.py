"""What an initiator keeps of a connection and of what NIXL was handed on it. Values; `Port` changes them."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.errors import TransferError
from transfer.base import Direction
from transfer.fragments import Fragment
from transfer.greeting import InitiatorGreeting
from transfer.nixl.descriptor import NixlDescriptor
from transfer.nixl.registrations import RegisteredRange


@dataclass(eq=False, slots=True, repr=False)
class Peer:
    """A connection to one segment. `error` is set once it is of no further use."""

    key: str
    descriptor: NixlDescriptor
    name: str
    nonce: int
    made_at: float
    greeted_at: float = 0.0
    used_at: float = 0.0
    base: int = 0
    """Where the segment lies: with the address, or told by its host to who has proved itself."""
    greeting: InitiatorGreeting | None = None
    """In a cluster with a secret."""
    confirmed: bool = False
    """It has said that it holds the segment."""
    num_batches: int = 0
    num_requests: int = 0
    error: TransferError | None = None

    def __repr__(self) -> str:
        state = f"failed: {self.error.message}" if self.error else "confirmed" if self.confirmed else "connecting"
        return (
            f"<Peer {self.descriptor.segment_id} agent={self.name} batches={self.num_batches} "
            f"requests={self.num_requests} {state}>"
        )

    def fail(self, error: TransferError) -> None:
        """Give it up. The first reason stays."""
        self.error = self.error or error


@dataclass(eq=False, slots=True)
class Request:
    """What NIXL was handed at once: fragments, and the registrations that they need.

    `bounce`: memory of ours that stands for the one fragment, whose bytes are copied to or from it.
    """

    handle: int
    direction: Direction
    peer: Peer
    fragments: Sequence[Fragment]
    num_bytes: int
    ranges: Sequence[RegisteredRange] = ()
    bounce: bytearray | None = None

    def deliver(self) -> None:
        """After a read: copy to where the bytes belong."""
        for fragment in self.fragments if self.direction == "read" else ():
            if self.bounce is not None:
                fragment.view[:] = memoryview(self.bounce)[: fragment.view.nbytes]
            fragment.scatter()
