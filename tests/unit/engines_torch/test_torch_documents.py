"""Documents in prompts of the torch engine, against the full computation of the same prompts."""

import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
import transformers
from support.engine_fakes import idle
from support.slow import slow_but
from support.tiny_models import make_tiny_model
from support.wrong_documents import FAULTS, spoil

from engines.paged.loop import EngineLoop
from engines.paged.options import EngineOptions
from engines.torch.model import load_model
from engines.torch.row_moves import documents_problem
from engines.torch.runner import TorchRunner
from engines.torch.spec import build_kv_spec
from kvcore.clock import SystemClock
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvcore.errors import InvalidRequestError
from nodeapi.documents import CompareReply, CompareRequest, Documents
from nodeapi.messages import GenerateRequest, LegInfo
from nodeapi.sampling import SamplingParams

BLOCK, CHUNK = 8, 16
HEADER = list(range(20, 33))
ONE, TWO, TAIL = list(range(100, 137)), list(range(200, 229)), list(range(300, 311))
JOINED = HEADER + ONE + TWO + TAIL
SPANS = [(13, 50), (50, 79)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_tiny_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


@asynccontextmanager
async def engine_of(folder: Path, *, num_blocks: int = 128, max_batch_tokens: int = 512) -> AsyncIterator[EngineLoop]:
    loaded = load_model(ModelConfig(path=str(folder), name="m"), TorchEngineConfig(block_size=BLOCK))
    runner = TorchRunner(loaded, build_kv_spec(loaded, "m", CHUNK, digest_cache=None), num_blocks=num_blocks, threads=1)
    options = EngineOptions(max_batch_tokens=max_batch_tokens, max_sequences=8, max_waiting=64)
    async with EngineLoop(runner, None, options, SystemClock()) as engine:
        yield engine


def documents(k: int, spans: list[tuple[int, int]] = SPANS) -> Documents:
    return Documents(header=len(HEADER), spans=spans, k=k)


async def compare(engine: EngineLoop, prompt: list[int], said: Documents | None) -> CompareReply:
    reply = await engine.compare(
        CompareRequest(request_id="c", prompt_token_ids=prompt, documents=said, num_tokens=5, deadline_s=60.0)
    )
    await idle(engine)
    return reply


async def info_of(engine: EngineLoop, prompt: list[int], said: Documents | None, **more: object) -> LegInfo:
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    wanted = GenerateRequest(
        request_id="g", prompt_token_ids=prompt, documents=said, sampling=params, deadline_s=60.0, **more
    )
    [info] = [delta.info async for delta in engine.generate(wanted) if delta.info is not None]
    return info


class Reference:
    """Documents reused by hand: transformers' own attention and cache, K turned in float64, one range after the other.

    `off_by`: turned that much too far; `shifted`: taken that many rows too late; `swapped`: each has the other's KV."""

    def __init__(self, folder: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self._frequencies = self._model.model.rotary_emb.inv_freq.double()

    @torch.inference_mode()
    def __call__(
        self, prompt: list[int], said: Documents, *, off_by: int = 0, shifted: int = 0, swapped: bool = False
    ) -> torch.Tensor:
        """Logarithms of the probabilities of the first token."""
        cache, end, logits = transformers.DynamicCache(), 0, torch.empty(0)
        taken = said.spans[::-1] if swapped else said.spans
        for (start, stop), (first, last) in zip(said.spans, taken, strict=True):
            begin = start + (0 if start == said.header else said.k)
            size = min(stop - begin, last - first - (begin - start) - shifted)
            alone = self._run(transformers.DynamicCache(), [*prompt[: said.header], *prompt[first:last]], 0)[0]
            self._run(cache, prompt[end:begin], end)
            row = said.header + begin - start + shifted
            for layer, kept in enumerate(alone.layers):
                keys, values = kept.keys[:, :, row : row + size], kept.values[:, :, row : row + size]
                cache.update(self._turned(keys, start - said.header + off_by), values, layer)
            end = begin + size
        logits = self._run(cache, prompt[end:], end)[1]
        return torch.log_softmax(logits[0, -1], dim=-1)

    def _run(
        self, cache: transformers.DynamicCache, tokens: list[int], start: int
    ) -> tuple[transformers.DynamicCache, torch.Tensor]:
        if not tokens:
            return cache, torch.empty(0)
        positions = torch.arange(start, start + len(tokens))[None]
        out = self._model(torch.tensor([tokens]), position_ids=positions, past_key_values=cache, use_cache=True)
        return cache, out.logits

    def _turned(self, keys: torch.Tensor, distance: int) -> torch.Tensor:
        turn = torch.polar(torch.ones_like(self._frequencies), self._frequencies * distance)
        low, high = keys.double().chunk(2, dim=-1)
        turned = torch.complex(low, high) * turn
        return torch.cat((turned.real, turned.imag), dim=-1).float()


async def logprobs_of(engine: EngineLoop, prompt: list[int], said: Documents) -> dict[int, float]:
    """Of the first token's likeliest."""
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
    wanted = GenerateRequest(request_id="g", prompt_token_ids=prompt, documents=said, sampling=params, deadline_s=60.0)
    [delta] = [delta async for delta in engine.generate(wanted)]
    assert delta.logprobs is not None
    return dict(delta.logprobs[0].top)


def distance(said: dict[int, float], reference: torch.Tensor) -> float:
    return max(abs(logprob - float(reference[token])) for token, logprob in said.items())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
async def test_a_document_behind_the_header_is_exact(folder, kind):
    prompt = HEADER + ONE + TAIL
    async with engine_of(folder(kind)) as engine:
        first = await compare(engine, prompt, documents(8, SPANS[:1]))
        assert (first.cached_tokens, first.approximate_tokens, first.computed_tokens) == (37, 0, 24)
        assert max(first.kl) < 1e-5 and first.agreement == 1.0


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
async def test_documents_computed_anew_in_full_are_the_full_computation(folder, kind):
    async with engine_of(folder(kind)) as engine:
        reply = await compare(engine, JOINED, documents(40))
        assert reply.approximate_tokens == 0
        assert max(reply.kl) < 1e-5
    async with engine_of(folder(kind)) as engine:
        nearly = await compare(engine, JOINED, documents(28))
        assert nearly.approximate_tokens == 1
        assert max(nearly.kl) < 1e-3


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
async def test_reused_documents_are_what_a_reference_makes_of_them(folder, kind):
    reference = Reference(folder(kind))
    async with engine_of(folder(kind)) as engine:
        said = await logprobs_of(engine, JOINED, documents(8))
    assert distance(said, reference(JOINED, documents(8))) < 1e-4
    for wrong in ({"off_by": 1}, {"shifted": 1}, {"swapped": True}):
        assert distance(said, reference(JOINED, documents(8), **wrong)) > 1e-3, wrong


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}])
async def test_k_that_rope_scales_is_turned_by_the_angle_alone(tmp_path, rope):
    """yarn multiplies cos and sin: what is in K already must not be multiplied again."""
    made = make_tiny_model("llama", tmp_path)
    config = json.loads((made / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    (made / "config.json").write_text(json.dumps(config))
    async with engine_of(made) as engine:
        assert distance(await logprobs_of(engine, JOINED, documents(8)), Reference(made)(JOINED, documents(8))) < 1e-4


async def test_documents_may_begin_and_end_anywhere_in_a_block_and_a_step_may_end_anywhere(folder):
    made, dice = folder("llama"), random.Random(7)
    reference = Reference(made)
    for _ in range(12):
        header = dice.randrange(0, 2 * CHUNK)
        prompt, spans = [dice.randrange(3, 500) for _ in range(header)], list[tuple[int, int]]()
        for _ in range(dice.randrange(1, 4)):
            prompt += [dice.randrange(3, 500) for _ in range(dice.choice([0, 0, 1, 5]))]
            size = dice.choice([1, 3, BLOCK, CHUNK, CHUNK + 1, dice.randrange(1, 60)])
            spans.append((len(prompt), len(prompt) + size))
            prompt += [dice.randrange(3, 500) for _ in range(size)]
        prompt += [dice.randrange(3, 500) for _ in range(dice.choice([0, 1, 9]))]
        said = Documents(header=header, spans=spans, k=dice.choice([0, 1, 8, 16]))
        async with engine_of(made, max_batch_tokens=dice.choice([7, 16, 512])) as engine:
            got = await logprobs_of(engine, prompt, said)
            await idle(engine)
        assert distance(got, reference(prompt, clipped(said, len(prompt)))) < 1e-4, said


def clipped(said: Documents, num_tokens: int) -> Documents:
    """As the engine takes it: of what is all computed anew nothing is reused, and the last token is computed."""
    reused = [
        (start, min(stop, num_tokens - 1))
        for start, stop in said.spans
        if start == said.header or stop - start > said.k
    ]
    return msgspec.structs.replace(said, spans=[(start, stop) for start, stop in reused if start < stop])


async def differences(engine: EngineLoop, fault: str | None) -> tuple[float, float]:
    """What comparisons of some prompts with documents say: the sums of their divergences and of their gaps."""
    said = documents(8, [(14, 46), (46, 94)])
    prompts = [random.Random(seed).choices(range(3, 500), k=100) for seed in range(4)]
    for prompt in prompts:
        await info_of(engine, prompt, said)  # the documents are ready, and right
    if fault is not None:
        spoil(engine._runner, fault)
    replies = [await compare(engine, prompt, said) for prompt in prompts]
    return sum(sum(reply.kl) for reply in replies), sum(sum(reply.gaps) for reply in replies)


@pytest.mark.parametrize("kind", slow_but(["qwen3"], ["llama", "qwen3"]))
async def test_a_comparison_sees_a_wrong_rotation_a_wrong_slice_and_swapped_documents(folder, kind):
    async with engine_of(folder(kind)) as engine:
        kl, gap = await differences(engine, None)
    for fault in FAULTS:
        async with engine_of(folder(kind)) as engine:
            wrong_kl, wrong_gap = await differences(engine, fault)
        assert wrong_kl > 1.3 * kl and wrong_gap > gap, fault


async def test_what_was_reused_is_told(folder):
    async with engine_of(folder("llama")) as engine:
        reply = await compare(engine, JOINED, documents(8))
        assert (reply.cached_tokens, reply.approximate_tokens, reply.computed_tokens) == (37, 21, 13 + 8 + 11)
        assert max(reply.kl) > 1e-5, "else documents did not attend to each other anyhow, and nothing was compared"


async def test_a_prompt_without_documents_is_the_same_behind_requests_with_them(folder):
    """To the last bit where no chunk is shared; else as near as any prompt whose prefix another one computed."""

    async def distribution(engine: EngineLoop, request_id: str) -> list[tuple[int, float]]:
        params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=20, ignore_eos=True)
        wanted = GenerateRequest(request_id=request_id, prompt_token_ids=JOINED, sampling=params, deadline_s=60.0)
        stream = [delta async for delta in engine.generate(wanted)]
        return [pair for delta in stream for one in delta.logprobs or [] for pair in one.top]

    async with engine_of(folder("llama")) as engine:
        plain = await distribution(engine, "plain")
    other = [7, *JOINED[1:]]
    async with engine_of(folder("llama")) as engine:
        assert (await info_of(engine, other, documents(8))).approximate_tokens
        assert await distribution(engine, "behind") == plain
    async with engine_of(folder("llama")) as engine:
        for prompt, spans in ((HEADER + TWO + ONE + TAIL, [(13, 42), (42, 79)]), (JOINED, SPANS)):
            assert (await info_of(engine, prompt, documents(8, spans))).approximate_tokens
        for (token, logprob), (wanted, exact) in zip(await distribution(engine, "behind"), plain, strict=True):
            assert token == wanted and abs(logprob - exact) < 1e-5


async def test_a_request_that_reuses_nothing_computes_all_and_keeps_nothing(folder):
    async with engine_of(folder("llama")) as engine:
        await info_of(engine, JOINED, None)
        for _ in range(2):
            info = await info_of(engine, JOINED, None, reuse=False)
            assert (info.cached_tokens, info.computed_tokens) == (0, len(JOINED))
    async with engine_of(folder("llama")) as engine:
        await info_of(engine, JOINED, None, reuse=False)
        assert (await idle(engine)).cached_blocks == 0


async def test_a_model_whose_k_cannot_be_turned_refuses_documents_by_name(folder):
    async with engine_of(folder("mistral_sliding")) as engine:
        assert "sliding window" in engine.info.refuses_documents
        with pytest.raises(InvalidRequestError, match="sliding window"):
            await info_of(engine, JOINED, documents(8))


@pytest.mark.parametrize(
    ("config", "numbers", "problem"),
    [
        ({"rope_parameters": {"rope_type": "dynamic"}}, 16, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, 16, "'longrope'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, 16, "sliding window"),
        ({"sliding_window": 48}, 16, "sliding window"),
        ({"kv_lora_rank": 512}, 16, "MLA"),
        ({}, 32, "16 of the 32 numbers"),
        ({"rope_parameters": {"rope_type": "yarn"}, "layer_types": ["full_attention"]}, 16, ""),
    ],
)
def test_what_cannot_be_turned_is_named(config, numbers, problem):
    said = documents_problem(SimpleNamespace(**config), torch.ones(8), numbers)
    assert problem in said if problem else not said
