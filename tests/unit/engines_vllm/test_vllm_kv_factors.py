"""What vLLM interprets without its showing in a KV tensor tells KV apart: every factor, pair by pair, hit or miss."""

import itertools
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from support.vllm_kv import BLOCK, kv_caches

from engines.vllm.connector.blocks.block_layout import measure
from engines.vllm.connector.settings import Provenance
from engines.vllm.kv_factors import KV_FACTORS, EngineFacts, LayerFacts, declared_factors
from kvcore.chunk_keys import root_key
from kvcore.kv_parts import differing_parts
from kvcore.types import KVSpec

LONG_ROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


def engine(
    *,
    version: str = "0.32.0",
    platform: str = "cuda",
    fp8: str = "float8_e4m3fn",
    layers: tuple[str, ...] = ("auto", "auto"),
    backends: tuple[str, ...] = ("FLASH_ATTN", "FLASH_ATTN"),
    block_size: int = 16,
    rope: dict[str, Any] | None = None,
    draft: tuple[str, dict[str, Any]] | None = None,
    **model: Any,
) -> EngineFacts:
    hf = SimpleNamespace(rope_parameters=rope)
    model = {
        "dtype": "torch.bfloat16",
        "quantization": None,
        "architecture": "LlamaForCausalLM",
        "disable_sliding_window": False,
        "max_model_len": 4096,
        "hf_text_config": hf,
    } | model
    speculative = None
    if draft is not None:
        method, settings = draft
        folder = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: settings), revision=None, code_revision=None)
        speculative = SimpleNamespace(
            method=method, draft_model_config=folder, uses_draft_kv_cache=lambda: method != "ngram"
        )
    config = SimpleNamespace(
        model_config=SimpleNamespace(**model),
        cache_config=SimpleNamespace(block_size=block_size),
        speculative_config=speculative,
    )
    return EngineFacts(config, version, platform, fp8, tuple(map(LayerFacts, layers, backends)))


def both(dtype: str) -> dict[str, Any]:
    return {"layers": (dtype, dtype)}


UINT8 = ("fp8_e5m2", "fp8_inc", "fp8_ds_mla", "nvfp4", "nvfp4_4over6", "int4_per_token_head", "fp8_per_token_head",
         "turboquant_k8v4", "turboquant_4bit_nc", "ultraquant_4bit", "a_kind_of_a_later_vllm")  # fmt: skip
TABLE: dict[str, list[list[dict[str, Any]]]] = {
    "kv-cache-dtype": [
        [{}, both("bfloat16")],  # auto is the model's
        [both("float16"), both("half")],
        [both("float32"), both("float")],
        [both("fp8"), both("fp8_e4m3")],
        [both("fp8") | {"fp8": "float8_e4m3fnuz"}, both("fp8_e4m3") | {"fp8": "float8_e4m3fnuz"}],
        *([both(name)] for name in UINT8),
        [{"layers": ("auto", "fp8")}, {"layers": ("bfloat16", "fp8_e4m3")}],  # kv-cache-dtype-skip-layers
        [{"layers": ("fp8", "auto")}],
    ],
    "attention-backend": [
        [{}],
        [{"backends": ("TRITON_ATTN", "TRITON_ATTN")}],
        [{"backends": ("FLASH_ATTN", "FLASHINFER")}, {"backends": ("FLASHINFER", "FLASH_ATTN")}],
    ],
    "block-size": [[{}], [{"block_size": 32}]],
    "disable-sliding-window": [[{}], [{"disable_sliding_window": True}]],
    "dtype": [
        [both("fp8") | {"dtype": "torch.bfloat16"}],
        [both("fp8") | {"dtype": "torch.float16"}],
        [both("fp8") | {"dtype": "torch.float32"}],
    ],
    "max-model-len": [
        [{}, {"max_model_len": 8192}],
        [{"rope": LONG_ROPE}, {"rope": LONG_ROPE, "max_model_len": 100}],
        [{"rope": LONG_ROPE, "max_model_len": 4097}, {"rope": LONG_ROPE, "max_model_len": 131072}],
    ],
    "model-impl": [[{}], [{"architecture": "TransformersForCausalLM"}]],
    "platform": [[{}], [{"platform": "rocm"}], [{"platform": "cpu"}]],
    "quantization": [[{}], [{"quantization": "fp8"}], [{"quantization": "awq"}]],
    "speculative-config": [
        [{}, {"draft": ("ngram", {"layers": 1})}],
        [{"draft": ("eagle3", {"layers": 1})}, {"draft": ("eagle3", {"layers": 1})}],
        [{"draft": ("eagle3", {"layers": 2})}],
        [{"draft": ("mtp", {"layers": 1})}],
    ],
    "vllm": [[{}], [{"version": "0.33.0"}]],
}
"""Factor -> its kinds: engines of one row share KV, engines of two do not. A dict: how it is unlike `engine()`."""


def spec_of(facts: EngineFacts) -> KVSpec:
    """With tensors that look the same whatever is in them."""
    provenance = Provenance(
        model_id="m", weights_digest="w", tokenizer_digest="t", attention="a", declared=declared_factors(facts)
    )
    return measure(kv_caches(3), num_blocks=3, block_size=BLOCK).build_spec(provenance, 4 * BLOCK, 0, 1)


def test_the_table_has_a_row_for_every_factor():
    assert TABLE.keys() == KV_FACTORS.keys()


@pytest.mark.parametrize("factor", TABLE)
def test_pair_by_pair_a_hit_or_a_miss_that_is_named(factor):
    engines = [(row, spec_of(engine(**how))) for row, hows in enumerate(TABLE[factor]) for how in hows]
    for (row, one), (other_row, other) in itertools.combinations(engines, 2):
        hit = root_key(one.fingerprint) == root_key(other.fingerprint)
        assert hit == (row == other_row), (one.declared, other.declared)
        assert list(differing_parts(one, other)) == ([] if hit else [factor])


def test_what_is_declared_survives_the_wire():
    spec = spec_of(engine(**both("fp8_e5m2")))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=KVSpec) == spec
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=KVSpec).fingerprint == spec.fingerprint
