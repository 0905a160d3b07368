"""Power of two choices: the less loaded of two nodes drawn by lot. Several routers that see the same load, a little too
late each, do not all choose the same node, as they would by the least load. Source: Mitzenmacher, "The Power of Two
Choices in Randomized Load Balancing", 2001.
"""

from collections.abc import Sequence

from router.routing.policy import Policy, Rules
from router.routing.scorers import PREFILL_TOKENS, SEQUENCES

_MASK = (1 << 64) - 1


def _mixed(turn: int) -> int:
    """64 bits that look drawn by lot, the same for the same turn (SplitMix64, Steele et al. 2014)."""
    value = (turn * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def better_of_two(totals: Sequence[float], turn: int) -> int:
    """The place of the lesser of two totals; of equal ones the first that was drawn."""
    count, drawn = len(totals), _mixed(turn)
    if count == 1:
        return 0
    first, step = (drawn & 0xFFFFFFFF) % count, 1 + (drawn >> 32) % (count - 1)
    second = (first + step) % count
    return second if totals[second] < totals[first] else first


def make() -> Policy:
    """See router.routing.policy."""
    return Policy(
        decoder=Rules(((SEQUENCES, 1.0),), pick=better_of_two),
        prefiller=Rules(((PREFILL_TOKENS, 1.0),), pick=better_of_two),
    )
