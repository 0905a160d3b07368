"""Every policy that a cluster file can name, held to what support.policy_conformance asks of one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.policy_conformance import CHECKS

from kvcore.config.routing import RoutingPolicy
from router.routing import policies
from router.routing.policy import RoutePolicy, make_policy


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", RoutingPolicy, ids=str)
def test_a_policy_conforms(name: RoutingPolicy, check: Callable[[RoutePolicy], None]) -> None:
    check(make_policy(name))


def test_each_name_of_a_policy_has_its_module_and_each_module_its_name() -> None:
    modules = {path.stem for path in Path(policies.__path__[0]).glob("[!_]*.py")}
    assert modules == {name.value for name in RoutingPolicy}
