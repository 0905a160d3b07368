"""How a prefiller's KV reaches the decoder: the kinds, and in one table all that differs between them.

Nothing else in the product asks which kind it is: it reads a field. A new kind is a row here, and in
`router/nodes/vllm_requests.py` what its prefill leg sends.
"""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class HandoffTraits:
    """What follows from a kind of handoff."""

    has_store: bool = False
    """The nodes are our own, started from the file's engine section, with segments and a metadata server. Else they are
    vLLM servers that run already, each with a `url` in the file."""
    waits_in_store: bool = False
    """The prefill leg saves into the decoder's segment. The decode leg starts beside it, waits for these chunks in the
    store, and can be told that no more will come."""
    decode_after_prefill: bool = False
    """The decode leg starts when the prefill leg has ended, with what that answered, and fetches from the prefiller."""
    decode_beside_prefill: bool = False
    """The decode leg starts beside the prefill leg, is told of it, and fetches from the prefiller. It cannot be told
    that nothing will come: it starts anew when the prefill leg fails."""
    bootstrap_server: bool = False
    """Prefillers have a bootstrap server, which decode legs must be told of."""


class HandoffKind(StrEnum):
    """How KV gets from a prefiller to a decoder."""

    KVFERRY = "kvferry"
    """Through our store; the nodes are ours."""
    NIXL = "nixl"
    """By vLLM's NixlConnector; the nodes are vLLM servers that run already."""
    MOONCAKE = "mooncake"
    """By vLLM's MooncakeConnector; likewise."""

    @property
    def traits(self) -> HandoffTraits:
        """Its row of the table."""
        return HANDOFFS[self]


HANDOFFS = {
    HandoffKind.KVFERRY: HandoffTraits(has_store=True, waits_in_store=True),
    HandoffKind.NIXL: HandoffTraits(decode_after_prefill=True),
    HandoffKind.MOONCAKE: HandoffTraits(decode_beside_prefill=True, bootstrap_server=True),
}


def has_store(kind: str) -> bool:
    """Of a kind by its name, as another process says it; a kind that this version does not know has none."""
    return kind in HANDOFFS and HandoffKind(kind).traits.has_store
