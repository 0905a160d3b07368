"""The runner's blocks: their bytes carry the KV, and a cancelled step has ended."""

import asyncio
from pathlib import Path

import pytest
from support.tiny_models import make_tiny_model

from engines.paged.runner import SampleSpec, StepSlice
from engines.torch.model import load_model
from engines.torch.runner import TorchRunner
from engines.torch.spec import build_kv_spec
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvcore.errors import EngineError
from nodeapi.sampling import SamplingParams

BLOCK = 16
PROMPT = list(range(10, 50))
GREEDY = SampleSpec(SamplingParams(temperature=0, max_tokens=4, logprobs=5), (0,), PROMPT, ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def make_runner(folder: Path, dtype: str = "float32") -> TorchRunner:
    loaded = load_model(ModelConfig(path=str(folder), name="m", dtype=dtype), TorchEngineConfig(block_size=BLOCK))
    spec = build_kv_spec(loaded, "m", BLOCK, digest_cache=None)
    return TorchRunner(loaded, spec, num_blocks=8, threads=1)


async def test_a_step_that_fails_is_an_engine_error_and_the_next_one_works(folder: Path) -> None:
    runner = make_runner(folder)
    with pytest.raises(EngineError, match="step of 1 slices"):
        await runner.execute([StepSlice([10**6], 0, [0], GREEDY)])
    assert len((await runner.execute([StepSlice(PROMPT, 0, [0, 1, 2], GREEDY)])).samples[0]) == 1
    await runner.aclose()
    await runner.aclose()


async def test_a_cancelled_step_has_ended_when_the_cancellation_arrives(folder: Path) -> None:
    runner = make_runner(folder)
    step = asyncio.create_task(runner.execute([StepSlice(PROMPT, 0, [5, 1, 3])]))
    await asyncio.sleep(0)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert any(runner.block_view(3))  # its last block was written: the step was not left running
    await runner.aclose()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_blocks_moved_as_bytes_to_another_runner_are_the_kv(folder: Path, dtype: str) -> None:
    one, two = make_runner(folder, dtype), make_runner(folder, dtype)
    await one.execute([StepSlice(PROMPT[:32], 0, [4, 2])])
    view = one.block_view(4)
    assert view.nbytes == one.info.kv_spec.chunk_bytes
    assert view.contiguous
    assert not view.readonly
    for source, target in ((4, 6), (2, 1)):
        two.block_view(target)[:] = one.block_view(source)
    two.copy_block(1, 7)
    rest = StepSlice(PROMPT[32:], 32, [4, 2, 0], GREEDY)
    expected = await one.execute([rest])
    got = await two.execute([StepSlice(PROMPT[32:], 32, [6, 7, 0], GREEDY)])
    assert got == expected
    two.block_view(6)[:] = bytes(view.nbytes)
    assert await two.execute([StepSlice(PROMPT[32:], 32, [6, 7, 0], GREEDY)]) != expected
    await one.aclose()
    await two.aclose()


async def test_only_slices_that_ask_for_samples_get_them(folder: Path) -> None:
    runner = make_runner(folder)
    slices = [StepSlice(PROMPT[:5], 0, [0]), StepSlice(PROMPT[:1], 0, [1], GREEDY), StepSlice(PROMPT[:1], 0, [2])]
    assert [len(samples) for samples in (await runner.execute(slices)).samples] == [0, 1, 0]
    assert (await runner.execute(slices[:1])).samples == [[]]
    with pytest.raises(IndexError):
        runner.block_view(8)
    await runner.aclose()


@pytest.mark.parametrize("length", [5, 20])
async def test_what_a_refused_chunk_left_in_a_block_does_not_reach_who_gets_the_block_next(
    folder: Path, length: int
) -> None:
    """A load whose bytes fail verification leaves them in its blocks: 0xff is a NaN in every dtype."""
    clean, dirty = make_runner(folder), make_runner(folder)
    for block in range(8):
        dirty.block_view(block)[:] = b"\xff" * dirty.block_view(block).nbytes
    outputs = []
    for runner in (clean, dirty):
        await runner.execute([StepSlice(PROMPT[:length], 0, [0, 1]), StepSlice(PROMPT[:31], 0, [2, 3])])
        both = [StepSlice([7], length, [0, 1], GREEDY), StepSlice([8], 31, [2, 3], GREEDY)]
        outputs.append(await runner.execute(both))
        await runner.aclose()
    assert outputs[0] == outputs[1]
