"""The doctor on a cluster file: nodes that could not share KV, and segments without room for a chunk."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.vllm.kv_factors import KV_FACTORS
from kvcore.config.fields import ByteSize
from kvcore.config.kv.settings import KVConfig
from kvcore.config.schema import (
    ClusterConfig,
    EngineConfig,
    ModelConfig,
    NodeConfig,
    SimEngineConfig,
    TorchEngineConfig,
    VllmEngineConfig,
)
from kvcore.types import Role
from kvferry.doctor.agreement import KV_ARGUMENTS, check_agreement, check_chunk_room
from kvferry.doctor.findings import Context, Finding


def cluster(engine: EngineConfig, *, segment: int = 1 << 30, path: str = "m", **own: EngineConfig) -> ClusterConfig:
    """p0, d0 and d1; `own`: the engines of some of them."""
    roles = {"p0": Role.PREFILLER, "d0": Role.DECODER, "d1": Role.DECODER}
    nodes = {
        name: NodeConfig(role=role, port=1, segment=ByteSize(segment), engine=own.get(name))
        for name, role in roles.items()
    }
    model = ModelConfig(path=path, name="m", dtype="bfloat16")
    return ClusterConfig(cluster="c", model=model, engine=engine, nodes=nodes, kv=KVConfig(chunk_tokens=128))


def vllm(**args: Any) -> VllmEngineConfig:
    return VllmEngineConfig(args={name.replace("_", "-"): value for name, value in args.items()})


def agreement(config: ClusterConfig) -> list[Finding]:
    return check_agreement(Context(config))


@pytest.mark.parametrize(
    ("whole", "prefiller", "said"),
    [
        (vllm(), vllm(kv_cache_dtype="fp8_e4m3"), "kv-cache-dtype fp8_e4m3 against bfloat16"),
        (vllm(block_size=32), vllm(block_size=128), "block-size 128 against 32"),
        (vllm(), vllm(tensor_parallel_size=2), "tensor-parallel-size 2 against 1"),
        (vllm(quantization="fp8"), vllm(quantization="awq"), "quantization awq against fp8"),
        (SimEngineConfig(), SimEngineConfig(weights_version="v2"), "engine.weights_version v2 against v1"),
        (TorchEngineConfig(), TorchEngineConfig(block_size=32), "engine.block_size 32 against 64"),
    ],
)
def test_a_prefiller_whose_kv_no_decoder_reads_is_wrong_and_the_argument_is_named(
    whole: EngineConfig, prefiller: EngineConfig, said: str
) -> None:
    (finding,) = agreement(cluster(whole, p0=prefiller))
    assert not finding.ok and finding.detail == f"prefiller p0 and decoder d0 cannot read each other's KV: {said}"
    assert finding.remedy == "give both the same, or p0 a cluster of its own"


@pytest.mark.parametrize(
    "prefiller",
    [
        vllm(kv_cache_dtype="auto"),
        vllm(kv_cache_dtype="bfloat16"),
        vllm(block_size=16),
        vllm(tensor_parallel_size=1, max_num_seqs=4),
    ],
)
def test_arguments_that_say_the_same_or_that_cannot_be_compared_are_well(prefiller: VllmEngineConfig) -> None:
    (finding,) = agreement(cluster(vllm(), p0=prefiller))
    assert finding.ok and finding.detail == "3 engines are set alike"


def test_one_decoder_of_several_is_told_of_as_the_odd_one() -> None:
    (finding,) = agreement(cluster(SimEngineConfig(), d0=SimEngineConfig(weights_version="v2")))
    assert finding.detail.startswith("decoder d0 and decoder d1 cannot read each other's KV")


def test_every_factor_of_vllms_kv_is_compared_or_no_argument_of_a_node() -> None:
    told_elsewhere = {"dtype", "max-model-len", "load-format"}  # of the model section, or refused by the file's rules
    told_elsewhere.add("speculative-config")  # by the router, once vLLM says whether its speculator has KV
    assert set(KV_FACTORS) - told_elsewhere - {"platform", "vllm"} <= set(KV_ARGUMENTS)


def test_a_segment_without_room_for_a_chunk_is_wrong(tmp_path: Path) -> None:
    findings = check_chunk_room(Context(cluster(SimEngineConfig(bytes_per_token=64), segment=8191)))
    assert [finding.subject for finding in findings] == ["segment p0", "segment d0", "segment d1"]
    assert findings[0].detail == "8.0 KiB, and one chunk of 128 tokens has about 8.0 KiB"
    assert "raise nodes.p0.segment: is a unit missing?" in findings[0].remedy
    assert not check_chunk_room(Context(cluster(SimEngineConfig(bytes_per_token=64), segment=8192)))
    shape = {"vocab_size": 9, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    chunk_bytes = 2 * 2 * 2 * 8 * 2 * 128
    for segment, wrong in ((chunk_bytes - 1, 3), (chunk_bytes, 0)):
        config = cluster(TorchEngineConfig(), segment=segment, path=str(tmp_path))
        assert len(check_chunk_room(Context(config))) == wrong
    assert not check_chunk_room(Context(cluster(TorchEngineConfig(), segment=1))), "the model is not here yet"


def test_a_tenants_share_without_room_for_a_chunk_is_wrong() -> None:
    config = cluster(SimEngineConfig(bytes_per_token=64), segment=16384)
    for share, wrong in ((0.4, 3), (0.5, 0)):
        held = msgspec.structs.replace(config, store=msgspec.structs.replace(config.store, tenant_share=share))
        findings = check_chunk_room(Context(held))
        assert len(findings) == wrong
        for finding in findings:
            assert (
                not finding.ok
                and finding.detail == "a tenant's share of it is 6.4 KiB, and one chunk has about 8.0 KiB"
            )
            assert "raise store.tenant_share" in finding.remedy
