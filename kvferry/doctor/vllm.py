"""Checks of this machine for the vLLM engines that belong on it: the installation, the cores. Nothing is imported."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.gpu_turns import gpus_of
from kvcore.config.schema import ModelConfig, VllmEngineConfig
from kvcore.config.vllm_options import argument
from kvcore.errors import ModelLoadError
from kvcore.model_folder import read_json
from kvcore.model_shape import kv_shape, text_part
from kvferry.doctor.findings import Context, Finding
from kvferry.vllm_here import (
    OLDEST,
    TOO_NEW,
    VllmBuild,
    cores,
    cuda_devices,
    installed_vllm,
    parse_cores,
    parse_size,
    ranks_of,
)

_PROCESSES_BYTES = 1_700 << 20
"""Measured on a CPU: the engine's front, vLLM's core and one worker, without weights and KV."""
_RANK_BYTES = 500 << 20
_GPU_FRONT_BYTES, _GPU_RANK_BYTES = 1_000 << 20, 1_600 << 20
"""Measured beside an H100: the engine's front and its guard, and vLLM's core with one worker."""
_INSTALL = "`pip install 'kvferry[vllm]'` (GPUs) or `make venv-vllm` (CPU), and run kvferry from there"
_OWN_GPUS = "give each engine its own: nodes.NAME.engine.env.CUDA_VISIBLE_DEVICES, e.g. 0 for one and 1 for another"
_GPU_PART = 0.92
"""vLLM's own `gpu-memory-utilization`, of 0.32 and 0.33."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one number of each `model.dtype`."""


def check_vllm(context: Context) -> list[Finding]:
    """vLLM is installed, of a version that the connector knows, and for the hardware that is here."""
    if not context.local_vllm:
        return []
    build = installed_vllm()
    if build is None:
        return [Finding("vllm", False, "vLLM is not installed here", _INSTALL)]
    if not build.supported:
        wanted = f">={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}.{TOO_NEW[1]}"
        detail = f"vLLM {build.version} is here, kvferry's connector is for {wanted}"
        return [Finding("vllm", False, detail, f"`pip install 'vllm{wanted}'`")]
    if build.platform == "cpu":
        return [Finding("vllm", True, f"{build.version}, for the CPU"), *_check_kv_size(context)]
    devices = cuda_devices()
    if not devices:
        return [Finding("vllm", False, f"vLLM {build.version} needs a GPU, and this machine has none", _INSTALL)]
    shown = f"{len(devices)} GPU{'s' if len(devices) > 1 else ''} ({', '.join(devices)})"
    wrong = _first_gpu_clash(context.local_vllm, devices)
    return [Finding("vllm", True, f"{build.version}, {shown}"), *([wrong] if wrong is not None else ())]


def _first_gpu_clash(engines: Mapping[str, VllmEngineConfig], devices: Sequence[str]) -> Finding | None:
    """Of what engines say that they take of this machine's GPUs. Whether there are those that they name is told where
    all are known by their indexes."""
    by_index = "CUDA_VISIBLE_DEVICES" not in os.environ
    parts: dict[str, dict[str, float]] = {}
    for name, engine in engines.items():
        ranks = ranks_of(engine.args)
        taken = gpus_of(os.environ | engine.env, ranks)
        missing = [gpu for gpu in taken if by_index and gpu.isdigit() and gpu not in devices]
        if missing:
            has = f"this machine has {', '.join(devices)}"
            return Finding("gpus", False, f"{name}: takes GPU {missing[0]}, {has}", _OWN_GPUS)
        if len(taken) < ranks:
            return Finding("gpus", False, f"{name}: tensor-parallel-size {ranks} on {len(taken)} GPUs", _OWN_GPUS)
        for gpu in taken:
            parts.setdefault(gpu, {})[name] = _gpu_part(engine)
    for gpu, shares in parts.items():
        if sum(shares.values()) > 1:
            told = " and ".join(f"{name} {part:g}" for name, part in shares.items())
            remedy = f"{_OWN_GPUS}, or engine.args.gpu-memory-utilization: 0.45"
            return Finding("gpus", False, f"GPU {gpu}: of its memory {told} are wanted", remedy)
    return None


def _gpu_part(engine: VllmEngineConfig) -> float:
    """Of a GPU's memory; 0 where the size of its KV is given, which says nothing of the weights."""
    if kv_bytes(engine) is not None:
        return 0.0
    try:
        return float(str(argument(engine.args, "gpu-memory-utilization") or _GPU_PART))
    except ValueError:  # vLLM says so
        return 0.0


def check_adapters(context: Context) -> list[Finding]:
    """Each of `model.adapters` is here, in PEFT's format. Reads its files, as the engine's start would."""
    adapters = context.config.model.adapters
    if not adapters or not context.local_vllm:
        return []
    from engines.vllm.adapters import read_adapters

    try:
        found = read_adapters({name: path for name, path in adapters.items() if Path(path).is_absolute()})
    except ModelLoadError as error:
        return [Finding("adapters", False, error.message, "model.adapters.NAME is where it is looked for")]
    shown = [f"{one.served.name} (rank {one.rank})" for one in found]
    hub = [f"{name} (looked up on the hub at start)" for name in adapters if not Path(adapters[name]).is_absolute()]
    return [Finding("adapters", True, ", ".join(shown + hub))]


def _check_kv_size(context: Context) -> list[Finding]:
    """On a CPU vLLM takes nearly all memory for KV unless it is told how much; two that do so do not fit."""
    silent = [name for name, engine in context.local_vllm.items() if kv_bytes(engine) is None]
    if not silent or len(context.local_vllm) == 1:
        return []
    detail = f"{', '.join(silent)}: nothing says how much memory KV may take, and vLLM then takes nearly all there is"
    return [Finding("vllm memory", False, detail, "set engine.args.kv-cache-memory-bytes, e.g. 1G")]


def check_cores(context: Context) -> list[Finding]:
    """Each engine on the CPU has cores of its own, which exist."""
    build = installed_vllm()
    if build is None or build.platform != "cpu" or not context.local_vllm:
        return []
    bound: dict[str, set[int] | None] = {}
    for name, engine in context.local_vllm.items():
        try:
            bound[name] = parse_cores(engine.env.get("VLLM_CPU_OMP_THREADS_BIND", "auto"))
        except ValueError as error:
            return [_wrong_cores(f"{name}: {error}")]
    wrong = _first_clash(bound)
    if wrong is not None:
        return [_wrong_cores(wrong)]
    shown = ", ".join(f"{name}: {_listed(numbers)}" for name, numbers in bound.items())
    return [Finding("cores", True, shown)]


def _first_clash(bound: dict[str, set[int] | None]) -> str | None:
    here, owners = set(cores()), dict[int, str]()
    if len(bound) > 1 and None in bound.values():
        unbound = next(name for name, numbers in bound.items() if numbers is None)
        return f"{unbound} is not bound to cores of its own, so that the engines here get into each other's way"
    for name, numbers in bound.items():
        for core in sorted(numbers or ()):
            if core not in here:
                return f"{name}: this machine gives us no core {core}, only {_listed(here)}"
            if owners.setdefault(core, name) != name:
                return f"core {core} is {owners[core]}'s and {name}'s"
    return None


def _listed(numbers: set[int] | None) -> str:
    return "chosen by vLLM" if numbers is None else ",".join(map(str, sorted(numbers)))


def _wrong_cores(detail: str) -> Finding:
    remedy = "set nodes.NAME.engine.env.VLLM_CPU_OMP_THREADS_BIND, e.g. 0-3 for one and 4-7 for another"
    return Finding("cores", False, detail, remedy)


def kv_bytes(engine: VllmEngineConfig) -> int | None:
    """What the file says that each rank's KV takes; None: nothing."""
    space = engine.env.get("VLLM_CPU_KVCACHE_SPACE", "")
    if space.isdigit() and int(space):
        return int(space) << 30
    return parse_size(argument(engine.args, "kv-cache-memory-bytes"))


def host_bytes(engine: VllmEngineConfig, model: ModelConfig, build: VllmBuild | None, chunk_tokens: int) -> int:
    """Main memory that an engine takes. On a GPU weights and KV lie elsewhere, but for chunks on their way."""
    ranks = ranks_of(engine.args)
    if build is not None and build.platform != "cpu":
        staging = ConnectorLimits().staging_slots * chunk_tokens * _token_bytes(model)
        return _GPU_FRONT_BYTES + ranks * _GPU_RANK_BYTES + staging
    processes = _PROCESSES_BYTES + _RANK_BYTES * (ranks - 1)
    return processes + weight_bytes(model) + ranks * (kv_bytes(engine) or 0)


def _token_bytes(model: ModelConfig) -> int:
    """KV of one token, in the model's dtype; 0: the model's folder does not say, or is not here yet."""
    try:
        shape = kv_shape(text_part(_model_config(model)), _config_file(model))
        return int(shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim) * DTYPE_BYTES[model.dtype]
    except (ModelLoadError, TypeError):
        return 0


def _model_config(model: ModelConfig) -> dict[str, Any]:
    """Its config.json; empty where that cannot be read."""
    try:
        return read_json(_config_file(model), "it describes the model")
    except ModelLoadError:
        return {}


def _config_file(model: ModelConfig) -> Path:
    return Path(model.path) / "config.json"


def weight_bytes(model: ModelConfig) -> int:
    """Of the model's weights once they are loaded; 0: not here yet."""
    stored = sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors") if file.is_file())
    config = _model_config(model)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return stored * DTYPE_BYTES[model.dtype] // DTYPE_BYTES.get(str(dtype), DTYPE_BYTES[model.dtype])
