"""Load or compute: whether the chunks that a tier has are there sooner than they would be computed. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadCosts:
    """What is known of both ways, for all chunks together. None: not measured yet."""

    num_bytes: int
    num_tokens: int
    load_rate: float | None
    """Bytes a second, of the tier."""
    prefill_rate: float | None
    """Tokens a second, of this node's engine."""


@dataclass(frozen=True, slots=True)
class LoadChoice:
    """`load`: whether to load; both times in seconds, None where nobody knows."""

    load: bool
    load_s: float | None
    compute_s: float | None


def choose(costs: LoadCosts) -> LoadChoice:
    """Load unless computing is known to be faster: what is loaded leaves the engine to others."""
    load_s = costs.num_bytes / costs.load_rate if costs.load_rate else None
    compute_s = costs.num_tokens / costs.prefill_rate if costs.prefill_rate else None
    return LoadChoice(load_s is None or compute_s is None or load_s <= compute_s, load_s, compute_s)
