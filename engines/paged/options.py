"""The bounds of one engine over the shared loop."""

from dataclasses import dataclass
from typing import Self

from kvcore.config.schema import PagedEngineConfig


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The names are those of the engine's configuration."""

    max_batch_tokens: int
    """Tokens of one step, over all sequences."""
    max_sequences: int
    """Sequences that run, and likewise sequences that load, at a time."""
    max_waiting: int
    """Sequences that wait for the engine before it refuses more."""
    save_output: bool = True
    """Whether chunks with generated tokens are saved too."""
    store_timeout_s: float = 30.0
    """For one call of the store."""
    close_s: float = 5.0
    """Saves under way have this long at the end."""
    max_unread: int = 256
    """Deltas that a slow reader may leave unread before its sequences are left out of steps."""

    @classmethod
    def of(cls, config: PagedEngineConfig, store_timeout_s: float) -> Self:
        """Those of an engine's configuration."""
        return cls(
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            max_waiting=config.max_waiting,
            save_output=config.save_output,
            store_timeout_s=store_timeout_s,
        )
