"""Whether the nodes of a cluster file can share KV: the same of all that KV depends on, chunks that fit. Pure but for
the model's config.json.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from engines.vllm.kv_factors import resolved_cache_dtype
from kvcore.config.checks import engine_of
from kvcore.config.schema import EngineConfig, ModelConfig, SimEngineConfig, TorchEngineConfig, VllmEngineConfig
from kvcore.config.vllm_options import argument
from kvcore.errors import ModelLoadError
from kvcore.types import Role
from kvferry.doctor.findings import Context, Finding
from kvferry.doctor.vllm import DTYPE_BYTES
from kvferry.machine import size_text
from router.nodes.vllm_model import read_model_facts

KV_ARGUMENTS: Mapping[str, object] = {
    "attention-backend": None,
    "block-size": None,
    "disable-sliding-window": False,
    "hf-overrides": None,
    "kv-cache-dtype": "auto",
    "model-impl": "auto",
    "quantization": None,
    "tensor-parallel-size": 1,
}
"""vLLM's arguments on which KV depends -> what stands for one that is not given; None: vLLM chooses by model and
hardware, so that one that is given and one that is not cannot be compared here. Not `speculative-config`: most
speculators have no KV of their own, and only vLLM knows which."""


def check_agreement(context: Context) -> list[Finding]:
    """No node computes KV that the others cannot read, as far as the file says it."""
    config = context.config
    engines = {name: engine_of(config, node) for name, node in config.nodes.items()}
    settings = {name: kv_settings(engine, config.model) for name, engine in engines.items() if engine is not None}
    decoders = [name for name in settings if config.nodes[name].role is Role.DECODER]
    if len(settings) < 2 or not config.handoff.traits.has_store:
        return []
    kinds = Counter(repr(own) for own in settings.values())
    main = max(decoders, key=lambda name: kinds[repr(settings[name])])
    findings = []
    for name, own in settings.items():
        if differing := _differing(own, settings[main]):
            shown = "; ".join(f"{key} {ours} against {theirs}" for key, (ours, theirs) in differing.items())
            detail = f"{config.nodes[name].role} {name} and decoder {main} cannot read each other's KV: {shown}"
            findings.append(Finding("shared KV", False, detail, f"give both the same, or {name} a cluster of its own"))
    return findings or [Finding("shared KV", True, f"{len(settings)} engines are set alike")]


def kv_settings(engine: EngineConfig, model: ModelConfig) -> dict[str, object]:
    """What an engine is told of all that its KV depends on, by the names that the file has for it; None: not said."""
    if isinstance(engine, VllmEngineConfig):
        given = {name: argument(engine.args, name) for name in KV_ARGUMENTS}
        settings = {name: KV_ARGUMENTS[name] if value is None else value for name, value in given.items()}
        dtype = resolved_cache_dtype(str(settings["kv-cache-dtype"]), model.dtype, fp8="")
        return settings | {"kv-cache-dtype": dtype}
    if isinstance(engine, SimEngineConfig):
        names = ("weights_version", "block_size", "bytes_per_token")
        return {f"engine.{name}": getattr(engine, name) for name in names}
    return {"engine.block_size": engine.block_size}


def _differing(one: Mapping[str, object], other: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    both = {name: (value, other.get(name)) for name, value in one.items()}
    return {name: pair for name, pair in both.items() if None not in pair and str(pair[0]) != str(pair[1])}


def check_chunk_room(context: Context) -> list[Finding]:
    """Each segment, and a tenant's share of it, has room for a chunk at least."""
    config = context.config
    chunk_bytes = _chunk_bytes(context) if config.handoff.traits.has_store else None
    if chunk_bytes is None:
        return []
    findings, share = [], config.store.tenant_share
    for name, node in config.nodes.items():
        if share is not None and share * node.segment < chunk_bytes <= node.segment:
            detail = f"a tenant's share of it is {size_text(int(share * node.segment))}, and one chunk has about "
            remedy = f"raise store.tenant_share or nodes.{name}.segment: nothing would be stored there"
            findings.append(Finding(f"segment {name}", False, detail + size_text(chunk_bytes), remedy))
        if node.segment < chunk_bytes:
            detail = f"{size_text(node.segment)}, and one chunk of {config.kv.chunk_tokens} tokens has about "
            remedy = f"raise nodes.{name}.segment: is a unit missing? `5` is five bytes, not 5GB"
            findings.append(Finding(f"segment {name}", False, detail + size_text(chunk_bytes), remedy))
    return findings


def _chunk_bytes(context: Context) -> int | None:
    """Payload of a chunk; None: the model is not here, or it is vLLM that decides what its KV is."""
    config = context.config
    if isinstance(config.engine, SimEngineConfig):
        return config.engine.bytes_per_token * config.kv.chunk_tokens
    if not isinstance(config.engine, TorchEngineConfig) or not Path(config.model.path).is_dir():
        return None
    try:
        spec = read_model_facts(config).kv_spec
    except ModelLoadError:
        return None
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * DTYPE_BYTES[config.model.dtype]
    return per_token * config.kv.chunk_tokens
