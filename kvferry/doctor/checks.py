"""What can be known before anything is started: each check says ok, or what is wrong and what to do.

Checks are functions of a `Context`; the launcher runs `preflight`, `kvferry doctor` runs all. They start nothing and
leave nothing behind.
"""

import errno
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from kvcore.config.checks import ports_of
from kvcore.config.schema import (
    ClusterConfig,
    EngineConfig,
    SimEngineConfig,
    VllmEngineConfig,
)
from kvcore.errors import ConfigError, ModelLoadError
from kvcore.ports import listen
from kvcore.process.descriptors import hard_limit
from kvferry.doctor.agreement import check_agreement, check_chunk_room
from kvferry.doctor.codecs import check_codecs, check_proofs
from kvferry.doctor.findings import Check, Context, Finding
from kvferry.doctor.joining import check_joining
from kvferry.doctor.memory import check_segment_pages, nodes_here, reserved_bytes
from kvferry.doctor.mooncake import check_mooncake, mooncake_bytes
from kvferry.doctor.objects import check_objects
from kvferry.doctor.records import check_records
from kvferry.doctor.running import silent_holder
from kvferry.doctor.security import check_security
from kvferry.doctor.servers import check_servers
from kvferry.doctor.tiers import check_redis
from kvferry.doctor.transports import check_transports
from kvferry.doctor.vllm import check_adapters, check_cores, check_vllm, host_bytes, weight_bytes
from kvferry.machine import is_local, size_text
from kvferry.rollout.check import check_rollout
from kvferry.vllm_here import installed_vllm
from router.descriptors import descriptors_needed, operators_at_most
from transfer.memory.available import available_memory

_BASE_PACKAGES = ("msgspec", "uvicorn", "fastapi", "aiohttp", "tokenizers", "xxhash", "numpy")
_TORCH_PACKAGES = ("torch", "transformers", "safetensors")
_ENGINE_BYTES = 400 << 20  # measured: interpreter, torch and transformers, without weights
_NODE_BYTES = 60 << 20


def check_python(_: Context) -> list[Finding]:
    """The interpreter's version, and Linux."""
    version = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13) and sys.platform == "linux"
    remedy = "" if ok else "use Python 3.11, 3.12 or 3.13 on Linux"
    return [Finding("python", ok, f"{version} on {sys.platform}", remedy)]


def check_packages(context: Context) -> list[Finding]:
    """What must be installed, with versions."""
    names = _BASE_PACKAGES + (_TORCH_PACKAGES if context.uses_torch else ())  # vLLM: see doctor_vllm
    found: dict[str, str] = {}
    missing: list[str] = []
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if not missing:
        return [Finding("packages", True, ", ".join(f"{name} {version}" for name, version in found.items()))]
    extra = "'kvferry[torch]'" if set(missing) & set(_TORCH_PACKAGES) else "kvferry"
    return [Finding("packages", False, f"not installed: {', '.join(missing)}", f"pip install {extra}")]


def check_ports(context: Context) -> list[Finding]:
    """Each port that a process of this machine will listen on can be bound."""
    findings = []
    for path, host, port in ports_of(context.config):
        name = path.removesuffix(".port").removeprefix("nodes.")
        if port == 0:
            if context.all_here and not path.endswith("transfer_port"):
                findings.append(Finding(f"port {name}", False, f"{path} is 0", "give it a number: others must know it"))
            continue
        if not context.all_here and not is_local(host):
            findings.append(Finding(f"port {name}", True, f"{host}:{port} is another machine's"))
            continue
        try:
            listen(host, port).close()
        except ConfigError as error:
            if name.removesuffix(".transfer_port").removesuffix(".admin_port") in context.running.names:
                findings.append(Finding(f"port {name}", True, f"{host}:{port} is held by this cluster, which runs"))
                continue
            asked = not context.all_here and getattr(error.__cause__, "errno", None) == errno.EADDRINUSE
            if asked and (silent := silent_holder(context.config, port)) is not None:
                findings.append(Finding(f"port {name}", False, f"{host}:{port} {silent[0]}", silent[1]))
                continue
            wrong, _, remedy = error.message.partition("; ")
            findings.append(Finding(f"port {name}", False, wrong, f"{remedy or 'set another port'} ({path})"))
        else:
            findings.append(Finding(f"port {name}", True, f"{host}:{port} is free"))
    return findings


def check_model(context: Context) -> list[Finding]:
    """The model folder is complete and of an architecture that the engine knows. Reads headers, not weights."""
    if isinstance(context.config.engine, SimEngineConfig):
        return [Finding("model", True, "the simulated engine needs none")]
    path = context.config.model.path
    if not Path(path).is_absolute():
        return [Finding("model", True, f"{path} is no folder here: it is looked up on the Hugging Face hub at start")]
    try:
        shown, folder = _torch_model(path) if context.uses_torch else _any_model(path)
    except ModelLoadError as error:
        demo = "kvferry prepare-demo-model makes the demo model; " if "/.cache/kvferry/" in path else ""
        return [Finding("model", False, error.message, f"{demo}model.path is where it is looked for")]
    return [Finding("model", True, f"{shown}, in {folder}"), _check_tokenizer(folder)]


def _torch_model(path: str) -> tuple[str, Path]:
    from engines.model_files import check_model_files

    files = check_model_files(path)
    return f"{files.architecture}, {files.num_parameters / 1e6:.0f} M parameters", files.folder


def _any_model(path: str) -> tuple[str, Path]:
    """vLLM knows many architectures and formats of weights, and judges them when it starts."""
    from kvcore.model_folder import find_folder, read_json

    folder = find_folder(path)
    config = read_json(folder / "config.json", "it describes the architecture")
    read_json(folder / "tokenizer.json", "the router tokenizes with it")
    return ", ".join(map(str, config.get("architectures") or ["of an unnamed architecture"])), folder


def _check_tokenizer(folder: Path) -> Finding:
    """As the router will load it, chat template included."""
    from router.text.tokenizer import FolderTokenizer

    try:
        tokenizer = FolderTokenizer(folder)
    except ModelLoadError as error:
        return Finding("tokenizer", False, error.message, "download or convert the model again")
    problem = tokenizer.chat_problem
    chat = "a chat template" if problem is None else f"{problem}: only /v1/completions will work"
    return Finding("tokenizer", True, f"{tokenizer.vocab_size} tokens, {chat}")


def check_descriptors(context: Context) -> list[Finding]:
    """Each process raises its soft limit to the hard one: that must do for `router.max_requests`."""
    router, num_nodes = context.config.router, len(context.config.nodes)
    if not context.all_here and not is_local(router.host):
        return []
    limit = hard_limit()
    operators = operators_at_most(limit) * ((router.admin_port is not None) + (router.processes > 1))
    needed = descriptors_needed(router.max_requests, num_nodes) + operators
    shown = f"{limit:,} allowed (ulimit -Hn), {needed:,} needed for router.max_requests {router.max_requests:,}"
    if limit >= needed:
        return [Finding("descriptors", True, shown)]
    how = "raise the hard limit (limits.conf, a unit's LimitNOFILE=, docker run --ulimit nofile=)"
    fitting = (limit - operators - descriptors_needed(0, num_nodes)) // (
        descriptors_needed(1, 0) - descriptors_needed(0, 0)
    )
    lower = f", or lower router.max_requests to {fitting:,}" if fitting > 0 else ""
    return [Finding("descriptors", False, shown, how + lower)]


def check_memory(context: Context) -> list[Finding]:
    """The segments (memfd: plain memory, /dev/shm's size does not matter) and engines of this machine fit."""
    config = context.config
    here = nodes_here(context)
    segments = sum(node.segment for node in here) - reserved_bytes(context)
    running = context.running.names
    starting = [engine for name, engine in context.local_engines() if name not in running]
    engines = sum(_engine_bytes(engine, config) for engine in starting)
    lent = mooncake_bytes(config) * len(here)
    needed = segments + engines + lent + _NODE_BYTES * (len(here) + 2)
    left = available_memory()
    of_it = f"{size_text(segments)} of it segments{f', {size_text(lent)} for Mooncake' if lent else ''}"
    parts = f"{size_text(needed)} needed ({of_it})"
    shown = f"{parts}, {size_text(left.size_bytes)} available ({left.source})"
    if needed <= left.size_bytes:
        return [Finding("memory", True, shown)]
    kv = "engine.args.kv-cache-memory-bytes" if context.local_vllm else "engine.kv_cache"
    lower = f"nodes.*.segment{', tiers.mooncake.global_segment_size' if lent else ''} or {kv}"
    remedy = f"lower {lower}, or start fewer nodes here"
    return [Finding("memory", False, shown, remedy)]


def _engine_bytes(engine: EngineConfig, config: ClusterConfig) -> int:
    if isinstance(engine, SimEngineConfig):
        return engine.num_blocks * engine.block_size * engine.bytes_per_token
    if isinstance(engine, VllmEngineConfig):
        return host_bytes(engine, config.model, installed_vllm(), config.kv.chunk_tokens)
    on_cpu = engine.device == "cpu"
    return _ENGINE_BYTES + ((weight_bytes(config.model) + engine.kv_cache) if on_cpu else 0)


def check_running(context: Context) -> list[Finding]:
    """What the router of a running cluster says is wrong between and with its nodes."""
    running = context.running
    if not any(name == "router" or name.startswith("routers[") for name in running.names):
        return []
    if not running.problems:
        return [Finding("router", True, "it runs, and uses every node")]
    remedy = "docs/troubleshoot.md says what it means and what to do"
    return [Finding("router", False, problem, remedy) for problem in running.problems]


PREFLIGHT: tuple[Check, ...] = (
    check_transports,
    check_ports,
    check_model,
    check_vllm,
    check_adapters,
    check_segment_pages,
    check_memory,
    check_security,
)
ALL_CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    *PREFLIGHT,
    check_cores,
    check_descriptors,
    check_agreement,
    check_chunk_room,
    check_servers,
    check_redis,
    check_objects,
    check_mooncake,
    check_codecs,
    check_proofs,
    check_records,
    check_joining,
    check_running,
    check_rollout,
)


def run_checks(context: Context, checks: Sequence[Check]) -> list[Finding]:
    """The findings of all `checks`, in order. Blocking, as long as a server that does not answer may take."""
    return [finding for check in checks for finding in check(context)]


def preflight(config: ClusterConfig) -> None:
    """Raise ConfigError with all that would keep this cluster from running on this machine."""
    wrong = [finding for finding in run_checks(Context(config, all_here=True), PREFLIGHT) if not finding.ok]
    if wrong:
        raise ConfigError("\n".join(f"{finding.subject}: {finding.detail}; {finding.remedy}" for finding in wrong))
