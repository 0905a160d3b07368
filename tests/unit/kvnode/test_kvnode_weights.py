"""How a node's engine gets other weights: in which order, what is refused, and that no version is half-changed."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from support.router_fakes import cluster_config, spec, two_and_two

from kvcore.clock import ManualClock
from kvcore.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelLoadError,
    NodeUnavailableError,
    OverloadedError,
)
from kvnode.weights import EngineWeights
from nodeapi.upkeep import WeightsRequest


class FakeSupervisor:
    """`said`: what happened, in order, with the version of that moment."""

    def __init__(self, weights: EngineWeights) -> None:
        self.weights, self.said = weights, list[str]()
        self.away = self.failing = False
        self.gate = asyncio.Event()
        self.gate.set()

    def engine(self) -> Any:
        if self.away:
            raise NodeUnavailableError("the node's engine is starting")

    async def replace(self) -> Any:
        self.said.append(f"replace {self.weights.version}")
        await self.gate.wait()
        if self.failing:
            raise ModelLoadError("a file is torn")
        return SimpleNamespace(info=SimpleNamespace(kv_spec=spec(self.weights.version)))

    @asynccontextmanager
    async def quiet(self, wait_s: float) -> Any:
        self.said.append(f"quiet {wait_s:g}")
        yield 2
        self.said.append("open")

    def take(self, version: str = "step-1", deadline_s: float = 9.0) -> Any:
        request = WeightsRequest(version=version, wait_s=3.0, deadline_s=deadline_s)
        return self.weights.take(request, self, self.quiet)  # type: ignore[arg-type]


def made() -> tuple[EngineWeights, FakeSupervisor]:
    weights = EngineWeights(cluster_config(two_and_two().nodes), ManualClock())
    return weights, FakeSupervisor(weights)


async def test_legs_end_then_the_engine_is_replaced_under_the_new_version() -> None:
    weights, supervisor = made()
    reply = await supervisor.take()
    assert supervisor.said == ["quiet 3", "replace step-1", "open"]
    assert (reply.fingerprint, reply.version, reply.cut) == (spec("step-1").fingerprint, "step-1", 2)
    assert weights.config.model.version == weights.version == "step-1"


async def test_what_cannot_be_done_now_changes_nothing() -> None:
    weights, supervisor = made()
    supervisor.away = True
    with pytest.raises(NodeUnavailableError):
        await supervisor.take()
    request = WeightsRequest(version="a", wait_s=1.0, deadline_s=1.0)
    with pytest.raises(InvalidRequestError, match="no engine"):
        await weights.take(request, None, supervisor.quiet)
    assert weights.version == "" and supervisor.said == []


async def test_a_second_change_is_refused_while_the_first_is_under_way() -> None:
    weights, supervisor = made()
    supervisor.gate.clear()
    first = asyncio.create_task(supervisor.take())
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="step-1"):
        await supervisor.take("step-2")
    supervisor.gate.set()
    assert (await first).version == weights.version == "step-1"


async def test_an_engine_that_does_not_start_or_is_late_leaves_the_new_version_to_the_next_try() -> None:
    weights, supervisor = made()
    supervisor.failing = True
    with pytest.raises(ModelLoadError):
        await supervisor.take("step-2")
    assert weights.version == "step-2"
    supervisor.gate.clear()
    with pytest.raises(DeadlineExceededError):
        await supervisor.take("step-3", deadline_s=0.01)
    assert weights.version == "step-3"
