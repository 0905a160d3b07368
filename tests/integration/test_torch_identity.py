"""Greedy tokens of the torch engine equal those of transformers' `generate`, token by token.

`support.generate_reference` says where a divergence is accepted: at a tie of the reference itself.
"""

from pathlib import Path

import pytest
import torch
import transformers
from support.generate_reference import PROMPTS, assert_identical, load_reference
from support.runner_driver import Driver, Sequence_
from support.slow import slow_but
from support.tiny_models import KINDS, MAX_CONTEXT, VOCAB_SIZE, make_tiny_model

from engines.torch.engine import build_torch_engine
from engines.torch.model import load_model
from engines.torch.runner import TorchRunner
from engines.torch.spec import build_kv_spec
from kvcore.config.fields import ByteSize
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvferry.demo.model import prepare_demo_model
from nodeapi.messages import GenerateRequest
from nodeapi.sampling import SamplingParams

CHUNK = 64
NEW_TOKENS = 16
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, MAX_CONTEXT - NEW_TOKENS)
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
QUICK_KINDS = ("llama", "mistral_sliding", "qwen3")
"""Of the models' kinds: those of `make check`. The others differ from them by less."""


@pytest.fixture(scope="module", params=slow_but(QUICK_KINDS, KINDS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def random_prompts(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def make_runner(folder: Path, *, block_size: int = 16, num_blocks: int = 800) -> TorchRunner:
    loaded = load_model(ModelConfig(path=str(folder), name="m"), TorchEngineConfig(block_size=block_size))
    spec = build_kv_spec(loaded, "m", CHUNK, digest_cache=None)
    return TorchRunner(loaded, spec, num_blocks=num_blocks, threads=1)


@pytest.mark.parametrize("budget", slow_but([33], [33, 4096]))
async def test_tokens_equal_generate_at_every_length_and_budget(tiny: Path, budget: int) -> None:
    reference, runner, prompts = load_reference(tiny), make_runner(tiny), random_prompts(LENGTHS)
    outputs = await Driver(runner, max_batch_tokens=budget).run([Sequence_(prompt, GREEDY) for prompt in prompts])
    await runner.aclose()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_identical(reference, prompt, output)


async def test_sixteen_staggered_requests_equal_generate(tiny: Path) -> None:
    reference, runner = load_reference(tiny), make_runner(tiny)
    prompts = random_prompts(tuple(range(5, 5 + 16 * 13, 13)), seed=2)
    outputs = await Driver(runner, max_batch_tokens=100).run(
        [Sequence_(prompt, GREEDY, arrives=2 * i) for i, prompt in enumerate(prompts)]
    )
    await runner.aclose()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_identical(reference, prompt, output)


async def test_engine_with_reused_prefix_equals_generate(tiny: Path) -> None:
    reference = load_reference(tiny)
    prefix, first, second = random_prompts((2 * CHUNK + 5, 20, 40), seed=3)
    model = ModelConfig(path=str(tiny), name="m")
    config = TorchEngineConfig(block_size=16, kv_cache=ByteSize(16 << 20), max_batch_tokens=50)
    async with build_torch_engine(model, config, CHUNK, lambda spec: None) as engine:
        for number, (tail, cached) in enumerate([(first, 0), (second, 2 * CHUNK)]):
            prompt, output, info = prefix + tail, [], None
            request = GenerateRequest(request_id=str(number), prompt_token_ids=prompt, sampling=GREEDY, deadline_s=60)
            async for delta in engine.generate(request):
                output += delta.token_ids
                info = info or delta.info
            assert info is not None
            assert info.cached_tokens == cached
            assert_identical(reference, prompt, output)
        assert (await engine.stats()).used_blocks == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_demo_model_equals_generate_on_ten_prompts() -> None:
    folder = prepare_demo_model()
    tokenizer, reference = transformers.AutoTokenizer.from_pretrained(folder), load_reference(folder)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    runner = make_runner(folder, block_size=64, num_blocks=100)
    outputs = await Driver(runner, max_batch_tokens=256).run([Sequence_(prompt, GREEDY) for prompt in prompts])
    await runner.aclose()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_identical(reference, prompt, output)
