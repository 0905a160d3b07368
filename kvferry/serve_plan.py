"""What `kvferry serve` decides: the cluster for one model on one machine, its engine, GPUs, cores and memory. Pure.

`kvferry.serve` looks at the machine, writes the cluster down and runs it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvcore.config.fields import ByteSize
from kvcore.config.kv.settings import KVConfig
from kvcore.config.records import MemoryRecordsConfig
from kvcore.config.schema import (
    ClusterConfig,
    EngineConfig,
    MetadataServerConfig,
    ModelConfig,
    NodeConfig,
    RouterConfig,
    ServiceConfig,
    TorchEngineConfig,
    VllmEngineConfig,
)
from kvcore.config.tiers import TiersConfig
from kvcore.config.vllm_options import argument, argument_name, check_arguments
from kvcore.errors import ConfigError
from kvcore.types import Role
from kvferry.vllm_here import VllmBuild, ranks_of, split_cores

Dtype = Literal["float32", "bfloat16", "float16"]
PREFILLER, DECODER = "prefill-0", "decode-0"
USUAL_PORTS = (8100, 8200, 8700)
_GIB = 1 << 30
_CHUNK_TOKENS = {"cpu": 128, "gpu": 256}
_BLOCK_TOKENS = {"cpu": 128, "gpu": 16}
"""vLLM's by default."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine has for engines and segments."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]
    memory_bytes: int
    vllm: VllmBuild | None
    has_torch: bool


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line asks for; None: choose."""

    folder: str
    """Of the model."""
    name: str
    """What clients send as `model`."""
    dtype: Dtype | None = None
    max_context: int | None = None
    colocated: bool = False
    engine: Literal["vllm", "torch"] | None = None
    port: int = 8000
    node_ports: tuple[int, int, int] = USUAL_PORTS
    """Of prefiller, decoder and metadata server."""
    kv_cache: ByteSize | None = None
    segment: ByteSize | None = None
    tiers: TiersConfig = field(default_factory=TiersConfig)
    args: Mapping[str, object] = field(default_factory=dict)


def plan_cluster(options: ServeOptions, machine: Machine) -> tuple[ClusterConfig, list[str]]:
    """The cluster, as its file has it, and what was decided, in words. Raises ConfigError where it cannot run."""
    kind, why = choose_engine(options.engine, machine)
    if options.args and kind != "vllm":
        raise ConfigError(
            f"--arg {next(iter(options.args))}: only vLLM has arguments, and the engine is {kind} ({why})"
        )
    platform = machine.vllm.platform if kind == "vllm" and machine.vllm is not None else "cpu"
    roles = {DECODER: Role.DECODER} if options.colocated else {PREFILLER: Role.PREFILLER, DECODER: Role.DECODER}
    share = _memory_share(machine, len(roles), platform)
    engine: EngineConfig
    own: dict[str, EngineConfig] = {}
    if kind == "vllm":
        engine, own, how = _vllm_engines(options, machine, platform, list(roles), share)
    else:
        threads = max(1, len(machine.cores) // len(roles))
        engine, how = TorchEngineConfig(threads=threads, kv_cache=options.kv_cache or share), f"{threads} threads each"
    prefill_port, decode_port, metadata_port = options.node_ports
    ports = {PREFILLER: prefill_port, DECODER: decode_port}
    dtype = options.dtype or ("bfloat16" if platform == "gpu" else "float32")
    config = ClusterConfig(
        cluster=cluster_name(options.name),
        model=ModelConfig(path=options.folder, name=options.name, dtype=dtype, max_context=options.max_context),
        engine=engine,
        kv=KVConfig(chunk_tokens=_chunk_tokens(engine, platform, options.max_context)),
        nodes={
            name: NodeConfig(role=role, port=ports[name], segment=options.segment or share, engine=own.get(name))
            for name, role in roles.items()
        },
        tiers=options.tiers,
        metadata_server=MetadataServerConfig(port=metadata_port, records=MemoryRecordsConfig()),
        router=RouterConfig(port=options.port),
        service=ServiceConfig(start_s=1800.0),  # vLLM on a GPU loads, compiles and captures graphs for minutes
    )
    what = "one engine with the cache" if options.colocated else "a prefiller and a decoder"
    return config, [f"engine: {kind}, {why}", f"{what}: {how}"]


def choose_engine(asked: Literal["vllm", "torch"] | None, machine: Machine) -> tuple[Literal["vllm", "torch"], str]:
    """The engine and the reason for it. Raises ConfigError if the one asked for, or any, is missing."""
    trouble = _vllm_trouble(machine)
    if asked != "torch" and trouble is None:
        assert machine.vllm is not None
        return "vllm", f"{machine.vllm.version} is installed"
    if asked == "vllm":
        raise ConfigError(f"--engine vllm: {trouble}")
    if not machine.has_torch:
        reason = "torch and transformers are not installed here"
        raise ConfigError(f"no engine: {reason}" if asked else f"no engine: {trouble}; and {reason}")
    return "torch", "as asked" if asked else f"since {trouble}"


def _vllm_trouble(machine: Machine) -> str | None:
    build = machine.vllm
    if build is None:
        return "vLLM is not installed here (`pip install 'kvferry[vllm]'` for GPUs, `make venv-vllm` for a CPU)"
    if not build.supported:
        return f"the vLLM that is installed here, {build.version}, is of another version than kvferry is for"
    if build.platform == "gpu" and not machine.gpus:
        return f"vLLM {build.version} needs a GPU and this machine has none"
    return None


def _vllm_engines(
    options: ServeOptions, machine: Machine, platform: str, names: Sequence[str], share: ByteSize
) -> tuple[VllmEngineConfig, dict[str, EngineConfig], str]:
    """The cluster's section, each node's own, and the division of the machine in words."""
    for name, problem in check_arguments(options.args):
        raise ConfigError(f"--arg {name}: {problem}")
    ranks = ranks_of(options.args)
    args: dict[str, object] = {}
    if platform == "cpu":
        args = {"enforce-eager": True, "kv-cache-memory-bytes": int(options.kv_cache or share)}
        variable, parts = "VLLM_CPU_OMP_THREADS_BIND", split_cores(machine.cores, len(names), ranks)
    else:
        if options.kv_cache is not None:
            args = {"kv-cache-memory-bytes": int(options.kv_cache)}
        variable, parts = "CUDA_VISIBLE_DEVICES", _split_gpus(machine.gpus, len(names), ranks, options.args)
    given = {argument_name(name): value for name, value in options.args.items()}
    own: dict[str, EngineConfig] = {
        name: VllmEngineConfig(env={variable: part}) for name, part in zip(names, parts, strict=True)
    }
    word = "cores" if platform == "cpu" else "GPU"
    how = ", ".join(f"{name} on {word} {part}" for name, part in zip(names, parts, strict=True))
    return VllmEngineConfig(args={**args, **given}), own, how


def _split_gpus(gpus: Sequence[str], engines: int, ranks: int, args: Mapping[str, object]) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each engine. Two engines share GPUs only if told how much of them each may take."""
    if len(gpus) >= engines * ranks:
        return [",".join(gpus[engine * ranks : (engine + 1) * ranks]) for engine in range(engines)]
    if len(gpus) < ranks:
        raise ConfigError(f"--arg tensor-parallel-size={ranks}: this machine has {len(gpus)} GPUs")
    part = argument(args, "gpu-memory-utilization")
    if not isinstance(part, int | float) or part > 1 / engines:
        raise ConfigError(
            f"a prefiller and a decoder need {engines * ranks} GPUs, this machine has {len(gpus)}: run one engine with "
            "the cache (--colocated), or have both on the same (--arg gpu-memory-utilization=0.45)"
        )
    return [",".join(gpus[:ranks])] * engines


def _memory_share(machine: Machine, nodes: int, platform: str) -> ByteSize:
    """Of each node's segment, and on a CPU of each engine's KV as well: an eighth of what is free for both together on
    a CPU, where weights need room too; up to 32 GiB from a quarter beside a GPU."""
    part, most = (4, 32 * _GIB) if platform == "gpu" else (8, 8 * _GIB)
    share = min(most, machine.memory_bytes // (part * nodes))
    return ByteSize(max(64 << 20, share >> 20 << 20))


def _chunk_tokens(engine: EngineConfig, platform: str, max_context: int | None) -> int:
    """The platform's, up to a whole number of the blocks that were asked for; less where the context is shorter."""
    wanted = _CHUNK_TOKENS[platform]
    block = argument(engine.args, "block-size") if isinstance(engine, VllmEngineConfig) else engine.block_size
    if not isinstance(block, int) or block < 1:
        block = _BLOCK_TOKENS[platform]
    blocks = -(-wanted // block)
    return block * (blocks if max_context is None else max(1, min(blocks, max_context // block)))


def cluster_name(model: str) -> str:
    """The cluster's name for a model: it can be the name of a folder."""
    return "serve-" + (re.sub(r"[^a-z0-9._-]+", "-", model.lower()).strip("-.") or "model")
