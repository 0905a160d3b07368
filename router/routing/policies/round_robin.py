"""Round robin: each in turn, whatever is cached where."""

from router.routing.policy import Policy, Rules


def make() -> Policy:
    """See router.routing.policy."""
    return Policy(decoder=Rules(), prefiller=Rules())
