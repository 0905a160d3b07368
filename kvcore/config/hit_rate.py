"""The `router.cache` of a cluster file: what is said of the hit rate, what clients may ask of it. Values only."""

from typing import Annotated

import msgspec

from kvcore.config.fields import Seconds, Section


class HitRateConfig(Section, frozen=True, kw_only=True):
    """What the router says of the hit rate, and whether clients may ask something of the cache."""

    warn_below: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.7
    """Share of the prompt tokens of the last hour: below it a warning says why, in the log once an hour and as long as
    it lasts in `kvferry status`. 0: never."""
    hints: bool = False
    """Whether `prompt_cache_retention`, `cache_control` and their like pin chunks. Of clients without API keys one
    could fill a quarter of all segments with its pins. They are shown in the request's record either way."""
    longest_pin_s: Seconds = 3600.0
    """A client that asks for longer gets this."""
