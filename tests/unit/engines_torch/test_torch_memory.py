"""The engine's KV memory is made known to the transports, once and before any chunk moves."""

from pathlib import Path

import numpy as np
import pytest
from support.store_fakes import World
from support.tiny_models import make_tiny_model

from engines.torch import engine as engine_module
from engines.torch.engine import build_torch_engine
from engines.torch.runner import TorchRunner
from kvcore.config.fields import ByteSize
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvcore.errors import ConfigError
from nodeapi.messages import PrefillRequest
from transfer.base import TransferOp
from transfer.inproc import InprocTransfer

CHUNK = 32


class Recording(InprocTransfer):
    """Writes down what it is told of and what it moves."""

    def __init__(self, world: World, *, full: bool = False) -> None:
        super().__init__(world.memory)
        self.regions: list[memoryview] = []
        self.moved: list[memoryview] = []
        self._full = full

    def register(self, region: memoryview) -> None:
        assert not self.moved
        if self._full:
            raise ConfigError(f"cannot register {region.nbytes} bytes (RDMA pins them: see `ulimit -l`)")
        self.regions.append(region)

    async def write(self, ops, timeout_s):  # type: ignore[no-untyped-def]
        self.moved += [view for op in ops for view in payload(op)]
        return await super().write(ops, timeout_s)


def payload(op: TransferOp) -> list[memoryview]:
    """Without the chunk's header, which is the store's."""
    return list(op.buffers[1:])


def span(view: memoryview) -> tuple[int, int]:
    start = np.frombuffer(view, np.uint8).ctypes.data
    return start, start + view.nbytes


class Closable(TorchRunner):
    """Says whether it was closed."""

    closed = False

    async def aclose(self) -> None:
        await super().aclose()
        self.closed = True


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[Closable]:
    """Those that engines made."""
    made: list[Closable] = []

    def make(*args, **settings):  # type: ignore[no-untyped-def]
        made.append(Closable(*args, **settings))
        return made[-1]

    monkeypatch.setattr(engine_module, "TorchRunner", make)
    return made


async def make_engine(folder: Path, *, full: bool = False):  # type: ignore[no-untyped-def]
    world = World()
    segment = world.add_node("p")
    transfer = Recording(world, full=full)
    engine = build_torch_engine(
        ModelConfig(path=str(make_tiny_model("llama", folder / "model")), name="m"),
        TorchEngineConfig(block_size=16, kv_cache=ByteSize(1 << 20), threads=1),
        CHUNK,
        lambda spec: world.store("p", transfer, spec=spec)[0],
    )
    return engine, transfer, segment


async def test_the_pool_is_registered_whole_and_once(tmp_path: Path, runners: list[Closable]) -> None:
    engine, transfer, segment = await make_engine(tmp_path)
    async with engine:
        (runner,), (region,) = runners, transfer.regions
        blocks = [runner.block_view(block) for block in range(engine.info.num_blocks)]
        assert span(region) == (span(blocks[0])[0], span(blocks[-1])[1])
        assert region.nbytes == sum(block.nbytes for block in blocks) and not region.readonly
        request = PrefillRequest(
            request_id="r", prompt_token_ids=list(range(3, 100)), prefer_segment=segment.id, deadline_s=60
        )
        assert (await engine.prefill(request)).stored_chunks == 3
    (start, end) = span(region)
    assert transfer.moved and all(start <= span(view)[0] < span(view)[1] <= end for view in transfer.moved)
    assert len(transfer.regions) == 1


async def test_memory_that_cannot_be_registered_stops_the_start(tmp_path: Path, runners: list[Closable]) -> None:
    engine, _, _ = await make_engine(tmp_path, full=True)
    with pytest.raises(ConfigError, match="ulimit -l"):
        await engine.__aenter__()
    assert [runner.closed for runner in runners] == [True]
