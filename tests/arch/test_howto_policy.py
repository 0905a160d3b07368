"""docs/how-to/policy.md is followed: its policy conforms, its test passes, and it routes a request."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.policy_conformance import CHECKS
from support.router_fakes import expected, make_rig

from nodeapi.sampling import SamplingParams
from router.requests.spec import RequestSpec
from router.routing.policy import RoutePolicy

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/policy.md"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's code as a module: the policy first, then its test."""
    file = tmp_path / "page_of_policies.py"
    file.write_text("\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, file.stem, raising=False)
    __import__(file.stem)
    return sys.modules.pop(file.stem)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_pages_policy_conforms(page: ModuleType, check: Callable[[RoutePolicy], None]) -> None:
    check(page.make())


def test_the_pages_own_test_passes(page: ModuleType) -> None:
    (own,) = [value for name, value in vars(page).items() if name.startswith("test_")]
    own()


async def test_the_pages_policy_routes_a_request(page: ModuleType) -> None:
    rig = await make_rig(policy=page.make())
    prompt = list(range(100))
    run = rig.dispatcher.open(RequestSpec("r", prompt, SamplingParams(max_tokens=4, temperature=0)))
    async with run:
        assert [token async for emit in run for token in emit.token_ids] == expected(prompt, 4)
    (record,) = rig.log.newest()
    assert record.route is not None and record.route.prefiller is not None
    assert {tuple(item.scores) for item in record.route.candidates} == {("sequences",), ("prefill_tokens",)}
    await rig.dispatcher.aclose()


def test_the_page_is_narrow_enough_to_read() -> None:
    assert all(len(line) < 160 for line in PAGE.read_text().splitlines())
