"""Bounds of what a router remembers of prompts, in one struct that tests may change. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """Memory and processor time of watching, and when there is enough to say something. At the defaults it takes 30 MiB
    and one percent of a core, at most."""

    known_prefixes: int = 1 << 20
    """Beginnings of prompts that are known, a power of two; 8 bytes each. Newer ones take the places of older ones."""
    known_runs: int = 1 << 18
    """Runs of tokens that are known, wherever they stand; likewise."""
    trace_bytes: int = 16 << 20
    """Of the last hour's prompts, to replay them."""
    trace_s: float = 3600.0
    tokens_per_s: float = 100_000.0
    """Prompt tokens looked at a second, 40 to 60 ns each; those of a twentieth of a second at once, so that no request
    waits for long. The prompts of more requests wait ..."""
    waiting_tokens: int = 500_000
    """... up to this; of still more prompts only the cached tokens are counted."""
    catch_up_s: float = 0.1
    """How often those that wait are looked at."""
    max_samples: int = 500_000
    """Uses of chunks that are replayed for one curve; more are sampled. 0.3 s of one core."""
    replay_s: float = 60.0
    """How often the last hour is replayed, beside the event loop, if there was a request since."""
    min_requests: int = 100
    """Answered in the last hour: before that a low hit rate means nothing."""
    min_share: float = 0.05
    """Of the prompt tokens: what is lost to less than this is not worth a word."""
    warn_s: float = 3600.0
    """How often the same warning is logged at most."""


@dataclass(frozen=True, slots=True)
class HintLimits:
    """What pins that clients ask for may take."""

    share_of_pins: float = 0.5
    """Of what all pins may take (`store.pin_share`): the rest is the operator's."""
    share_of_one_salt: float = 0.5
    """Of that, for those with one `cache_salt`, or with none."""
