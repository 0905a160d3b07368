"""What a cluster file says to vLLM: which arguments are kvferry's own, how a node's section is laid over the cluster's,
and the environment of the engine's processes. Pure: vLLM's parser judges the rest.
"""

import ipaddress
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvcore.config.schema import ClusterConfig, ModelConfig, TorchEngineConfig, VllmEngineConfig

_FOLDER = "give model.path: the router reads the same folder"
_CONNECTOR = "it puts kvferry's store under vLLM; the top-level `handoff` chooses another connector"
_ADAPTERS = "give model.adapters"
_MAX_NAME_CHARS = 256
_ONE_MACHINE = "an engine lives on one machine; add nodes"

RESERVED: Mapping[str, str] = {
    "model": "give model.path",
    "tokenizer": _FOLDER,
    "tokenizer-revision": _FOLDER,
    "revision": _FOLDER,
    "code-revision": _FOLDER,
    "served-model-name": "give model.name",
    "dtype": "give model.dtype",
    "max-model-len": "give model.max_context",
    "host": "give nodes.NAME.host; clients come to router.host",
    "port": "give nodes.NAME.port; clients come to router.port",
    "kv-transfer-config": _CONNECTOR,
    "kv-connector": _CONNECTOR,
    "kv-connector-module-path": _CONNECTOR,
    "kv-connector-extra-config": _CONNECTOR,
    "kv-role": _CONNECTOR,
    "kv-load-failure-policy": "it is `recompute`: a chunk that cannot be loaded is computed",
    "kv-offloading-size": "the store is that cache; give nodes.NAME.segment",
    "kv-offloading-backend": "the store is that cache; give nodes.NAME.segment",
    "disable-hybrid-kv-cache-manager": "the store keeps KV of one kind of block",
    "enable-sleep-mode": "the store's transports hold the addresses of the KV memory",
    "disable-log-stats": "the node's /metrics needs them",
    "enable-lora": _ADAPTERS,
    "lora-": _ADAPTERS,
    "default-mm-loras": _ADAPTERS,
    "max-cpu-loras": "all of model.adapters stay in main memory",
    "data-parallel-": "one engine a node; add nodes",
    "nnodes": _ONE_MACHINE,
    "node-rank": _ONE_MACHINE,
    "master-addr": _ONE_MACHINE,
    "master-port": _ONE_MACHINE,
    "headless": _ONE_MACHINE,
}
"""vLLM's arguments that kvferry sets, or that would undo what it sets, and where to go instead. A name that ends in `-`
stands for all that begin with it."""


def argument_name(name: str) -> str:
    """One spelling for what vLLM takes as `max_num_seqs`, `max-num-seqs` and `--max-num-seqs`."""
    return name.lstrip("-").replace("_", "-")


def argument(args: Mapping[str, object], name: str) -> object:
    """The value of `name`, however it is spelt; None: not given."""
    return next((value for given, value in args.items() if argument_name(given) == name), None)


def check_arguments(args: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(name as given, what is wrong with it)."""
    seen: dict[str, str] = {}
    for given in args:
        name = argument_name(given)
        if not name:
            yield given, "not the name of an argument"
        elif (instead := _reserved(name)) is not None:
            yield given, f"kvferry sets this itself; {instead}"
        elif name == "load-format" and args[given] == "dummy":
            yield given, "the store tells KV apart by the weight files, and these are not their weights"
        elif (first := seen.setdefault(name, given)) != given:
            yield given, f"given twice, as {first} too"


def _reserved(name: str) -> str | None:
    """vLLM's parser also takes `no-NAME`, `NAME.key` and any beginning of a name."""
    head = name.partition(".")[0].removeprefix("no-")
    for known, instead in RESERVED.items():
        if known.startswith(head) or (known.endswith("-") and head.startswith(known)):
            return instead
    return None


def check_adapters(config: ClusterConfig) -> Iterator[str]:
    """What is wrong with `model.adapters`, as `path: explanation`. What their folders hold is the engine's question."""
    model = config.model
    for name in model.adapters:
        path = f"model.adapters.{name}"
        if not (0 < len(name) <= _MAX_NAME_CHARS and name.isprintable()):
            yield f"{path}: the name of an adapter has 1 to {_MAX_NAME_CHARS} printable characters"
        elif name in (model.name, *model.aliases):
            yield f"{path}: the model itself is called {name}; give the adapter another name"
    if not model.adapters:
        return
    if not config.handoff.traits.has_store:
        yield (
            f"model.adapters: with handoff {config.handoff} the servers run already and say themselves which adapters "
            "they serve (--lora-modules); take it out"
        )
    engines = {"engine": config.engine} | {f"nodes.{name}.engine": node.engine for name, node in config.nodes.items()}
    for path, engine in engines.items():
        if isinstance(engine, TorchEngineConfig):
            yield f"model.adapters: {path}: the torch engine serves no adapters; engine.kind: vllm does"


def spell_out_engines(raw: dict[str, object]) -> None:
    """Change a cluster file, as read: lay each node's vllm section over the cluster's, when that is vllm too.

    The rule: what the node gives replaces what the cluster gives, `args` and `env` name by name, and `kind` may be left
    out. Numbers in `env` become text. What is of a wrong type is left for the parser to refuse.
    """
    whole, nodes = raw.get("engine"), raw.get("nodes")
    _env_to_text(whole)
    for node in nodes.values() if isinstance(nodes, dict) else ():
        own = node.get("engine") if isinstance(node, dict) else None
        _env_to_text(own)
        if isinstance(own, dict) and _is_vllm(whole) and own.get("kind", "vllm") == "vllm":
            assert isinstance(node, dict) and isinstance(whole, dict)
            node["engine"] = _laid_over(whole, own)


def _is_vllm(section: object) -> bool:
    return isinstance(section, dict) and section.get("kind") == "vllm"


def _env_to_text(section: object) -> None:
    """`CUDA_VISIBLE_DEVICES: 0` is what people write; YAML makes it a number."""
    env = section.get("env") if isinstance(section, dict) else None
    if isinstance(section, dict) and isinstance(env, dict):
        section["env"] = {
            name: str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
            for name, value in env.items()
        }


def _laid_over(whole: dict[str, object], own: dict[str, object]) -> dict[str, object]:
    merged = {**whole, **own}
    for field in ("args", "env"):
        below, above = whole.get(field), own.get(field)
        if isinstance(below, dict) and isinstance(above, dict):
            spelling = argument_name if field == "args" else str
            replaced = {spelling(str(name)) for name in above}
            merged[field] = {name: v for name, v in below.items() if spelling(str(name)) not in replaced} | above
    return merged


def engine_environment(engine: VllmEngineConfig, model: ModelConfig, host: str) -> dict[str, str]:
    """What the engine's processes get beside the node's own environment. `env` of the file has the last word."""
    ours = {"VLLM_NO_USAGE_STATS": "1"}
    if Path(model.path).is_absolute():  # a folder, once the file is read; else a hub id
        ours["HF_HUB_OFFLINE"] = "1"
    if _is_address(host):
        ours["VLLM_HOST_IP"] = host
    return ours | engine.env


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
