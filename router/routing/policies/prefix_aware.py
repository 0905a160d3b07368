"""Prefix aware: cheapest first, by outstanding work plus what would have to be brought over from other nodes or tiers,
or handed over by a slow link.

Of equal nodes each session has its own.
"""

from router.routing.policy import Policy, Rules
from router.routing.scorers import HANDING_OVER, PREFILL_TOKENS, REMOTE_TOKENS, SEQUENCES, SESSIONS, TIER_TOKENS

SEQUENCE_COST_TOKENS = 64.0
"""One more running sequence on a decoder weighs as much as this many tokens to bring over."""
REMOTE_TOKEN_COST = 0.25
"""A cached token on another node costs this share of computing it (loading measured at 4 to 10 times faster)."""


def make() -> Policy:
    """See router.routing.policy."""
    return Policy(
        decoder=Rules(
            scorers=(
                (SEQUENCES, SEQUENCE_COST_TOKENS),
                (REMOTE_TOKENS, REMOTE_TOKEN_COST),
                (TIER_TOKENS, 1.0),
                (SESSIONS, 1.0),
            ),
            by_load=True,
        ),
        prefiller=Rules(
            scorers=(
                (PREFILL_TOKENS, 1.0),
                (REMOTE_TOKENS, REMOTE_TOKEN_COST),
                (TIER_TOKENS, 1.0),
                (HANDING_OVER, 1.0),
            ),
            by_load=True,
        ),
    )
