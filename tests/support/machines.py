"""Settings of Hypothesis' state machines."""

from hypothesis import HealthCheck, settings


def machine_settings(max_examples: int) -> settings:
    """For runs of 40 steps; a failure prints what repeats it."""
    return settings(
        max_examples=max_examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
