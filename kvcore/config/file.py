"""Read a cluster file: YAML plus `--set` overrides -> a checked, frozen `ClusterConfig`, or a ConfigError.

Every error names the file, the path in it (`nodes.decode-0.segment`), the value and what would be right. The types
come from `kvcore.config.schema`, the conversion is `kvcore.config.parse`'s, rules across fields are in
`kvcore.config.checks`.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from kvcore.config.checks import check_cluster
from kvcore.config.parse import InvalidValueError, nearest, parse
from kvcore.config.schema import ClusterConfig, NodeConfig, SimEngineConfig
from kvcore.config.security import ClusterTlsConfig, PublicTextConfig, TlsConfig
from kvcore.config.vllm_options import spell_out_engines
from kvcore.config.yaml_text import YAMLTextError, read_yaml
from kvcore.errors import ConfigError

_SHOWN_CHARS = 60
_HUB_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Read, override, convert and check. `overrides` are `a.b=value`, the value in YAML. Blocking.

    `transport` is always a TransportConfig afterwards; `model.path` and the paths of `model.adapters` are absolute for
    the torch engine and vLLM, unless one is a hub id (`owner/name`) and no folder; so are the files of `security`
    and of `router.tls`.
    """
    file = Path(path).expanduser()
    raw = _read(file)
    _spell_out_transport(raw)
    named = _node_names(raw)
    for override in overrides:
        _apply(raw, override)
    spell_out_engines(raw)
    try:
        _check_new_nodes(raw, named)
        config = parse(raw, ClusterConfig)
        problems = check_cluster(config)
    except InvalidValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    if problems:
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))
    folder = file.resolve().parent
    return _resolve_security_paths(_resolve_model_path(config, folder), folder)


def node_config(config: ClusterConfig, name: str) -> NodeConfig:
    """The node called `name`, to be run here; raises ConfigError that lists the names there are."""
    if name not in config.nodes:
        near = difflib.get_close_matches(name, config.nodes, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no node {name!r} in cluster {config.cluster!r}: {hint}it has {', '.join(config.nodes)}")
    node = config.nodes[name]
    if node.url is not None:
        raise ConfigError(f"node {name!r} is the vLLM server at {node.url}, which runs already: start the router only")
    return node


def _read(file: Path) -> dict[str, object]:
    try:
        raw = read_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file{_similar_file(file)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except YAMLTextError as error:
        raise ConfigError(f"{file}: not valid YAML{error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a mapping with `cluster`, `model`, `engine` and `nodes`")
    return raw


def _similar_file(file: Path) -> str:
    names: Iterable[str] = (other.name for other in file.parent.glob("*.yaml")) if file.parent.is_dir() else ()
    near = difflib.get_close_matches(file.name, list(names), 1)
    return f" (did you mean {file.parent / near[0]}?)" if near else ""


def _spell_out_transport(raw: dict[str, object]) -> None:
    """`transport: tcp` and `devices: [..]` beside it -> the section. Anything else is left for `parse` to judge."""
    short = raw.get("transport")
    section: object = {"kind": short} if isinstance(short, str) else short
    if "devices" in raw and (section is None or (isinstance(section, dict) and "devices" not in section)):
        section = {**(section or {}), "devices": raw.pop("devices")}
    if section is not None:
        raw["transport"] = section


def _apply(raw: dict[str, object], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if keys[0] == "security":  # a secret that somebody wrote there is not shown
        override = path
    if not separator or not all(keys):
        raise ConfigError(f"--set {override}: expected path=value, e.g. --set router.port=8001")
    try:
        value = read_yaml(text)
    except YAMLTextError as error:
        raise ConfigError(f"--set {_shortened(override)}: the value is not valid YAML{error}") from error
    if keys in (["transport"], ["devices"]) and not isinstance(value, dict):
        section = raw.setdefault("transport", {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: transport is not a section")
        keys, section_value = ["transport"], value
        value = {**section, "kind" if path.strip() == "transport" else "devices": section_value}
    place: object = raw
    for key in keys[:-1]:
        place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override}: {key} is not a section")
    assert isinstance(place, dict)
    place[keys[-1]] = value


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def _node_names(raw: dict[str, object]) -> list[str]:
    nodes = raw.get("nodes")
    return [str(name) for name in nodes] if isinstance(nodes, dict) else []


def _check_new_nodes(raw: dict[str, object], named: list[str]) -> None:
    """A node that only overrides speak of is a new one if they give its role; else its name is mistyped."""
    nodes = raw.get("nodes")
    for name, node in nodes.items() if isinstance(nodes, dict) else ():
        if str(name) not in named and named and isinstance(node, dict) and "role" not in node:
            raise InvalidValueError(f"nodes.{name}: no such node{nearest(str(name), named)}")


def _resolve_model_path(config: ClusterConfig, folder: Path) -> ClusterConfig:
    if config.handoff.traits.has_store and isinstance(config.engine, SimEngineConfig):
        return config  # to the simulated engine it is a name

    def resolved(path: str) -> str:
        absolute = str(folder / Path(path).expanduser())
        return path if _HUB_ID.fullmatch(path) and not Path(absolute).exists() else absolute  # or: is on the hub

    adapters = {name: resolved(path) for name, path in config.model.adapters.items()}
    model = msgspec.structs.replace(config.model, path=resolved(config.model.path), adapters=adapters)
    return msgspec.structs.replace(config, model=model)


def _resolve_security_paths(config: ClusterConfig, folder: Path) -> ClusterConfig:
    security = config.security
    if (secret := security.secret) is not None and secret.file is not None:
        secret = msgspec.structs.replace(secret, file=_within(folder, secret.file))
    if (keys := security.keys) is not None:
        files = [one if one.file is None else PublicTextConfig(file=_within(folder, one.file)) for one in keys.public]
        file = None if keys.file is None else _within(folder, keys.file)
        keys = msgspec.structs.replace(keys, file=file, public=files)
    if (own := security.tls) is not None:
        cert, key, ca = (_within(folder, file) for file in (own.cert, own.key, own.ca))
        security = msgspec.structs.replace(security, tls=ClusterTlsConfig(cert=cert, key=key, ca=ca))
    if (tls := config.router.tls) is not None:
        tls = TlsConfig(cert=_within(folder, tls.cert), key=_within(folder, tls.key))
        config = msgspec.structs.replace(config, router=msgspec.structs.replace(config.router, tls=tls))
    return msgspec.structs.replace(config, security=msgspec.structs.replace(security, secret=secret, keys=keys))


def _within(folder: Path, file: str) -> str:
    return str(folder / Path(file).expanduser())
