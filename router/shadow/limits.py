"""Bounds of what is compared in the background, in one struct that tests may change. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShadowLimits:
    """Of one router's process."""

    waiting: int = 32
    """Requests that wait to be compared; the oldest goes for a new one."""
    waiting_tokens: int = 256 << 10
    """Of their prompts."""
    patience_s: float = 300.0
    """How long one waits for its node to have nothing to do. What it reused is less and less there."""
    poll_s: float = 1.0
    """Between two looks for an idle node."""
    deadline_s: float = 120.0
    """Of one comparison."""
    reply_s: float = 2.0
    """For its reply to come, beyond that."""
    tokens: int = 12
    """That a comparison goes on for."""
    keep_again_s: float = 2.0
    """Between two looks at what the metadata server keeps of turned kinds."""
    most: float = 1e9
    """That a distance or a gap counts for, as JSON has no infinity and nothing that is no number."""
    remembered: int = 32
    """Findings about chunks that are shown."""


@dataclass(frozen=True, slots=True)
class BlendGateLimits:
    """When documents are judged, and how much is remembered of them."""

    judged_from: int = 8
    """Comparisons of a kind before it is judged: a mean of fewer says little."""
    window: int = 64
    """The latest ones, of which the means are."""
    kinds: int = 1024
    """Of models and adapters, as many as are judged; documents of all beyond are not reused."""
    most_nats: float = 20.0
    """That one comparison counts for: a divergence may be infinite."""
