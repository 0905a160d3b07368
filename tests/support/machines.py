"""Hypothesis' examples: how its state machines run, and the slow tests that try more of them than `make check`."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine


def machine_settings(max_examples: int) -> settings:
    """For runs of 40 steps; a failure prints what repeats it."""
    return settings(
        max_examples=max_examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def longer(machine: type[RuleBasedStateMachine], max_examples: int) -> Any:
    """The test of this machine, as a slow one."""
    kind: Any = type(f"Long{machine.__name__}", (machine,), {})
    kind.TestCase.settings = machine_settings(max_examples)
    return pytest.mark.slow(kind.TestCase)


def more_examples(
    test: Callable[..., None], drawn: Callable[[Callable[..., None]], Callable[..., None]], max_examples: int
) -> Any:
    """`test`, of which `drawn` is the `given`, as a slow one. What else it is marked with is to be said again."""
    inner: Any = test
    return pytest.mark.slow(settings(max_examples=max_examples, deadline=None)(drawn(inner.hypothesis.inner_test)))
