"""Work that a node was chosen for, as part of the node's load. Values and counts only."""

from dataclasses import dataclass

from router.nodes.known import KnownNode


@dataclass(slots=True, eq=False)
class NodeWork:
    """Work of this router that a node was chosen for: part of the node's load from then on, until it has ended or will
    not be done. `node` None: it was no longer known."""

    node: KnownNode | None
    sequences: int = 0
    prefill_tokens: int = 0
    begun: bool = False

    def count(self, sequences: int, prefill_tokens: int, now: float) -> None:
        """So much more of it, or less."""
        node, computed = self.node, self.prefill_tokens > 0
        self.sequences += sequences
        self.prefill_tokens += prefill_tokens
        if node is None:
            return
        load = node.own
        load.sequences += sequences
        load.prefills += (self.prefill_tokens > 0) - computed
        if prefill_tokens < 0 or (prefill_tokens and not load.prefill_tokens):
            load.computing_since = now if prefill_tokens < 0 else now + node.told_left_s(now)
        load.prefill_tokens += prefill_tokens
        node.touch()

    def taken(self, sequences: int) -> "NodeWork":
        """What a leg takes of it, at most so many sequences: load of the node as before."""
        taken = NodeWork(self.node, min(sequences, self.sequences), self.prefill_tokens, begun=True)
        self.sequences, self.prefill_tokens = self.sequences - taken.sequences, 0
        return taken
