"""What an initiator keeps of a connection and of what NIXL was handed on it. Values; `Port` changes them."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.errors import TransferError
from transfer.base import Direction
from transfer.nixl.descriptor import NixlDescriptor
from transfer.nixl.registrations import Claim
from transfer.pieces import Piece


@dataclass(eq=False, slots=True)
class Peer:
    """A connection to one segment. `error` is set once it is of no further use."""

    key: str
    descriptor: NixlDescriptor
    name: str
    nonce: int
    made_at: float
    greeted_at: float = 0.0
    used_at: float = 0.0
    welcome: bool = False
    jobs: int = 0
    num_requests: int = 0
    error: TransferError | None = None

    def fail(self, error: TransferError) -> None:
        """Give it up. The first reason stays."""
        self.error = self.error or error


@dataclass(eq=False, slots=True)
class Request:
    """What NIXL was handed at once: pieces, and what they need. `slab`: memory of ours that stands for the piece."""

    handle: int
    direction: Direction
    peer: Peer
    pieces: Sequence[Piece]
    num_bytes: int
    claims: Sequence[Claim] = ()
    slab: bytearray | None = None

    def deliver(self) -> None:
        """After a read: copy to where the bytes belong."""
        for piece in self.pieces if self.direction == "read" else ():
            if self.slab is not None:
                piece.view[:] = memoryview(self.slab)[: piece.view.nbytes]
            piece.scatter()
