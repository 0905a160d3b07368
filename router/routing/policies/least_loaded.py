"""Least loaded: the least outstanding work, whatever is cached where."""

from router.routing.policy import Policy, Rules
from router.routing.scorers import PREFILL_TOKENS, SEQUENCES


def make() -> Policy:
    """See router.routing.policy."""
    return Policy(
        decoder=Rules(((SEQUENCES, 1.0),), by_load=True), prefiller=Rules(((PREFILL_TOKENS, 1.0),), by_load=True)
    )
