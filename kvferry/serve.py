"""`kvferry serve MODEL`: a cluster for one model on this machine, without a file.

Looks at the machine, writes down the cluster that `kvferry.serve_plan` decides on and runs it as `up` does.
"""

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.config.yaml_text import YAMLTextError, read_yaml
from kvcore.errors import ConfigError
from kvcore.ports import listen
from kvcore.state_folder import state_folder
from kvferry.cluster_text import cluster_text, size_text
from kvferry.lmcache.draft import Draft
from kvferry.serve_plan import USUAL_PORTS, Machine, ServeOptions, plan_cluster
from kvferry.tier_options import shown
from kvferry.vllm_here import cores, cuda_devices, installed_vllm

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+")


def this_machine() -> Machine:
    """The cores, GPUs, memory and engines that this process finds. Blocks for a second at most."""
    from transfer.memory.available import available_memory

    has_torch = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
    return Machine(cores(), cuda_devices(), available_memory().size_bytes, installed_vllm(), has_torch)


def find_model(model: str) -> tuple[str, str]:
    """(folder, name that clients use). A model on the hub is downloaded now, once for all processes, which then need no
    network. Raises ConfigError."""
    from kvcore.model_folder import find_folder

    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), folder.resolve().name
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"{model}: there is no such folder, and it is no id of a model on the hub (owner/name) either"
        )
    return str(find_folder(model, HUB_FILES).resolve()), model


def node_ports(host: str = "127.0.0.1") -> tuple[int, int, int]:
    """Free ports for prefiller, decoder and metadata server: the usual ones, else any."""
    first, second, third = (_free_port(host, usual) for usual in USUAL_PORTS)
    return first, second, third


def _given(options: ServeOptions) -> list[str]:
    """Keys that options have set."""
    tiers = options.tiers
    given = {
        "segment": options.segment,
        "disk": tiers.disk,
        "redis": tiers.redis,
        "object": tiers.object,
        "mooncake": tiers.mooncake,
    }
    return [key for key, value in given.items() if value is not None]


def _tiers_said(config: ClusterConfig) -> list[str]:
    """What tiers there are, in words."""
    disk, redis, objects = config.tiers.disk, config.tiers.redis, config.tiers.object
    said = [] if disk is None else [f"disk tier: {size_text(disk.size)} of each node, in {disk.path}"]
    said += [] if redis is None else [f"redis tier: {shown(redis.url)}"]
    said += [] if objects is None else [f"object tier: {objects.url}"]
    if (mooncake := config.tiers.mooncake) is None:
        return said
    lent = f"{size_text(mooncake.global_segment_size)} of each node" if mooncake.global_segment_size else "nothing"
    return [*said, f"mooncake tier: {mooncake.master}, lent {lent} (tiers.mooncake.global_segment_size)"]


def _free_port(host: str, usual: int) -> int:
    try:
        probe = listen(host, usual)
    except ConfigError:
        probe = listen(host, 0)
    with probe:
        return int(probe.getsockname()[1])


def parse_arguments(given: Sequence[str]) -> dict[str, object]:
    """`NAME=VALUE`, the value in YAML; `NAME` alone is true. Raises ConfigError."""
    args: dict[str, object] = {}
    for text in given:
        name, separator, value = text.partition("=")
        try:
            args[name.strip()] = read_yaml(value) if separator else True
        except YAMLTextError as error:
            raise ConfigError(f"--arg {name}: the value is not valid YAML{error}") from None
    return args


def run_serve(options: ServeOptions, overrides: Sequence[str], imported: Draft | None = None) -> int:
    """Runs until a signal; returns the exit code of `run_up`. `options.folder` may be a hub id.

    What is `imported` from LMCache's settings gives way to options and overrides. Raises ConfigError."""
    from kvferry.doctor.checks import preflight
    from kvferry.launch.up import run_up

    machine = this_machine()
    plan_cluster(options, machine)  # refuse what cannot be before a model is downloaded
    folder, name = find_model(options.folder)
    planned, said = plan_cluster(replace(options, folder=folder, name=name), machine)
    if imported is not None:
        overrides = [*imported.overrides(list(planned.nodes), _given(options)), *overrides]
        said += [f"LMCache's {note}" for note in imported.notes]
    file = state_folder(planned.cluster) / "cluster.yaml"
    draft = file.with_suffix(".new.yaml")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        draft.chmod(0o600)  # a tier's URL may have a password
        draft.write_text(cluster_text(planned), encoding="utf-8")
        config = load_config(draft, overrides)
        preflight(config)  # before the file of a cluster that may be running is replaced
        if overrides:
            draft.write_text(cluster_text(config), encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
    for line in [*said, *_tiers_said(config), f"cluster file: {file} (kvferry status --config, kvferry doctor)"]:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    return run_up(file, [], None)
