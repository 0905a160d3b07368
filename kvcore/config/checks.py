"""Rules of a cluster file that take more than one field. Pure; the bounds of a single field are in its type."""

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from kvcore.config.kv_identity import all_tiers
from kvcore.config.schema import (
    ClusterConfig,
    EngineConfig,
    MetadataServerConfig,
    NodeConfig,
    SimEngineConfig,
    VllmEngineConfig,
)
from kvcore.config.server_checks import EVERY_INTERFACE, check_addresses
from kvcore.config.servers import address_of, as_router_at, own_host, own_ports, partitions_of, routers_of, servers_of
from kvcore.config.vllm_options import argument, check_adapters, check_arguments
from kvcore.ports import is_loopback
from kvcore.types import Role

_MAX_NAME_CHARS = 100
_LEAST_SEGMENT = 1 << 10
_BESIDE_TLS = "read and write segments, forge chunks, and use the router"
_EVENTS_AT = re.compile(r"tcp://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[1-9][0-9]{0,4}")
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def check_cluster(config: ClusterConfig) -> list[str]:
    """What is wrong, as `path: explanation`; empty: nothing."""
    named = _check_name(config.cluster)
    ours = _check_engines(config) if config.handoff.traits.has_store else _check_servers(config)
    if servers := check_addresses(config):
        return [*named, *servers]
    rest = (
        check_adapters,
        _check_nodes,
        _check_ports,
        _check_cors,
        _check_bounds,
        _check_mooncake,
        _check_dialect,
        _check_security,
    )
    return [*named, *ours, *(problem for check in rest for problem in check(config))]


def _check_name(cluster: str) -> Iterator[str]:
    """It names a folder of logs."""
    if not re.fullmatch(r"[\w.-]*[\w-][\w.-]*", cluster) or len(cluster) > _MAX_NAME_CHARS:
        yield f"cluster: {cluster!r}: a name of letters, digits, '-', '_' and '.', at most {_MAX_NAME_CHARS} long"


def engine_of(config: ClusterConfig, node: NodeConfig) -> EngineConfig | None:
    """The engine that `node` runs: its own, else the cluster's; None for a store."""
    return None if node.role is Role.STORE else node.engine or config.engine


def _check_engines(config: ClusterConfig) -> Iterator[str]:
    if config.engine is None:
        yield "engine: missing (only the servers that handoff nixl and mooncake drive bring their own)"
        return
    engines: dict[str, EngineConfig] = {"engine": config.engine}
    engines |= {f"nodes.{name}.engine": node.engine for name, node in config.nodes.items() if node.engine is not None}
    for path, engine in engines.items():
        if isinstance(engine, VllmEngineConfig):
            yield from _check_vllm(path, engine, config.engine)
            if config.kv.shadow:
                yield f"kv.shadow: {path} is vllm, which compares nothing (engine torch does); take it out"
            block_path, block_size = f"{path}.args.block-size", argument(engine.args, "block-size")
        else:
            block_path, block_size = f"{path}.block_size", engine.block_size
        if isinstance(block_size, int) and block_size > 0 and config.kv.chunk_tokens % block_size:
            yield (
                f"{block_path}: {block_size} does not divide kv.chunk_tokens {config.kv.chunk_tokens};"
                " a chunk is a whole number of blocks"
            )
        if isinstance(engine, SimEngineConfig) and engine.bytes_per_token % 16:
            yield f"{path}.bytes_per_token: {engine.bytes_per_token} is not a multiple of 16"
    kinds = {type(engine_of(config, node)) for node in config.nodes.values()} - {type(None)}
    if len(kinds) > 1:
        yield "engine: the nodes' engines are of several kinds; they could not share KV"
    for name, node in config.nodes.items():
        if node.url is not None:
            yield f"nodes.{name}.url: only handoff nixl and mooncake drive servers that are not ours; set handoff"
        if node.events is not None or node.events_replay is not None:
            yield f"nodes.{name}.events: only servers with a url tell of their cache so; take it out"
        elif node.port == 0:
            yield f"nodes.{name}.port: missing"


def _check_vllm(path: str, engine: VllmEngineConfig, whole: EngineConfig) -> Iterator[str]:
    """What a node has from the cluster's section is told there."""
    told = whole.args if isinstance(whole, VllmEngineConfig) and whole is not engine else {}
    for name, problem in check_arguments(engine.args):
        if name not in told or told[name] != engine.args[name]:
            yield f"{path}.args.{name}: {engine.args[name]!r}: {problem}"
    for name in engine.env:
        if not name or "=" in name or "\0" in name + engine.env[name]:
            yield f"{path}.env.{name}: not a variable that a process can have"


def _check_servers(config: ClusterConfig) -> Iterator[str]:
    """With the handoff of others, every node is a vLLM server that runs already."""
    if config.engine is not None:
        yield f"engine: nothing is started with handoff {config.handoff}, the servers run already; take it out"
    defaults = {field.name: field.default for field in msgspec.structs.fields(NodeConfig)}
    owners: dict[str, str] = {}
    for name, node in config.nodes.items():
        if node.role is Role.STORE:
            yield f"nodes.{name}.role: with handoff {config.handoff} there is no store; prefiller or decoder"
        if node.url is None:
            yield f"nodes.{name}.url: missing; with handoff {config.handoff} every node is a server that runs already"
            continue
        if problem := _url_problem(node.url):
            yield f"nodes.{name}.url: {node.url!r}: {problem}"
        if (owner := owners.setdefault(node.url.rstrip("/"), name)) != name:
            yield f"nodes.{name}.url: {node.url} is {owner} already; one server has one role"
        for field in ("host", "port", "transfer_port", "segment", "engine", "host_id"):
            if getattr(node, field) != defaults[field]:
                yield f"nodes.{name}.{field}: means nothing beside url; take it out"
        meets = config.handoff.traits.bootstrap_server and node.role is Role.PREFILLER
        if node.bootstrap_port is not None and not meets:
            yield f"nodes.{name}.bootstrap_port: only prefillers with handoff mooncake have one"
        for field in ("events", "events_replay"):
            where = getattr(node, field)
            if where is not None and not (_EVENTS_AT.fullmatch(where) and int(where.rpartition(":")[2]) < 1 << 16):
                yield f"nodes.{name}.{field}: expected tcp://HOST:PORT, where the server binds"
        if node.events_replay is not None and node.events is None:
            yield f"nodes.{name}.events_replay: means nothing without events"


def _url_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        fits = False
    if not fits or parts.query or parts.fragment or parts.username:
        return "expected http://HOST:PORT, where the server's /v1 is"
    if parts.path.rstrip("/").endswith("/v1"):
        return "leave out the /v1"
    return None


def _check_nodes(config: ClusterConfig) -> Iterator[str]:
    if not any(node.role is Role.DECODER for node in config.nodes.values()):
        yield "nodes: no node has role decoder; a cluster needs at least one (prefillers are optional)"
    for name, node in config.nodes.items():
        if not name or not all(character.isalnum() or character in "-_" for character in name):
            yield f"nodes.{name}: a node's name consists of letters, digits, - and _"
        if name == "router" or name.startswith(("router-", "metadata-server")):
            yield f"nodes.{name}: the name stands for the cluster's own {name}; choose another"
        if node.url is None and node.segment < _LEAST_SEGMENT:
            yield (
                f"nodes.{name}.segment: {node.segment} bytes hold no chunk of any model; is a unit missing, as in 5GB?"
            )
        if node.role is Role.STORE and node.engine is not None:
            yield f"nodes.{name}.engine: a store has no engine"
        if node.host in EVERY_INTERFACE:
            yield f"nodes.{name}.host: {node.host} is every interface; give the address by which the others reach it"
    for path, host, _ in metadata_ports(config.metadata_server):
        if host in EVERY_INTERFACE and not all(node.host in _THIS_MACHINE for node in config.nodes.values()):
            named = path.replace(".port", ".host")
            yield f"{named}: {host} is every interface; give the address by which the nodes reach it"


def _check_security(config: ClusterConfig) -> Iterator[str]:
    security = config.security
    secret, heard = security.secret, heard_elsewhere(config)
    if secret is not None and sum(given is not None for given in (secret.file, secret.env, secret.command)) != 1:
        yield "security.secret: give one of file, env and command"
    if secret is not None and secret.every_s is not None and secret.command is None:
        yield "security.secret.every_s: it is for a command; a file is read again by itself, the environment never"
    if config.transport.integrity == "frames":
        if secret is None:
            yield "transport.integrity: frames needs the cluster's secret: set security.secret"
        if config.transport.kind not in ("auto", "tcp"):
            yield f"transport.integrity: only tcp has frames to make MACs of, transport.kind is {config.transport.kind}"
    if security.tls is not None and not config.handoff.traits.has_store:
        yield f"security.tls: with handoff {config.handoff} no processes of ours ask each other; take it out"
    if config.kv.verify == "mac" and secret is None:
        yield "kv.verify: mac needs the cluster's secret: set security.secret"
    if config.kv.encrypt:
        yield from _check_encryption(config)
    for path, tier in all_tiers(config):
        if tier.encrypt and secret is None:
            yield f"{path}.encrypt: it needs the cluster's secret: set security.secret"
    keys = config.security.keys
    if keys is not None and (keys.file is None) == (keys.env is None):
        yield "security.keys: give one of file and env"
    for number, one in enumerate(keys.public if keys is not None else ()):
        if (one.text is None) == (one.file is None):
            yield f"security.keys.public[{number}]: give one of text and file"
    if keys is not None and secret is None:
        yield "security.keys: tenants' salts come from the cluster's secret; set security.secret too"
    if secret is not None and security.open:
        yield "security.open: a cluster with a secret is not open; take it out"
    if secret is None and not security.open and heard:
        path, host = heard[0]
        more = f" (and {len(heard) - 1} more)" if len(heard) > 1 else ""
        can = "can use it" if security.tls is None else f"can {_BESIDE_TLS}, which certificates do not prevent"
        yield (
            f"{path}: {host} is reached from other machines{more}, and without a secret whoever reaches it {can}: "
            "set security.secret (`kvferry secret new FILE` makes one), or security.open: true on a network that only "
            "trusted machines reach"
        )
    for name in config.nodes if security.nodes is not None else ():
        if name not in (security.nodes or ()):
            yield f"nodes.{name}: security.nodes does not list it"


def _check_encryption(config: ClusterConfig) -> Iterator[str]:
    if config.security.secret is None:
        yield "kv.encrypt: it needs the cluster's secret: set security.secret"
    if config.kv.verify not in (True, "mac"):
        yield f"kv.encrypt: what is encrypted is proved too; take kv.verify: {config.kv.verify} out"
    if not config.handoff.traits.has_store:
        yield f"kv.encrypt: with handoff {config.handoff} vLLM moves KV itself, and nobody encrypts it; take it out"


def heard_elsewhere(config: ClusterConfig) -> list[tuple[str, str]]:
    """(path, host) of what listens where other machines reach it."""
    found = {_host_path(path): host for path, host, _ in ports_of(config) if not is_loopback(host)}
    return list(found.items())


def _host_path(path: str) -> str:
    """Of a port's path: of the key that says on what it listens."""
    if ".processes[" in path:
        return path.rpartition("[")[0]
    if path.endswith("]"):
        return path
    return f"{path.rpartition('.')[0]}.{'admin_host' if path.endswith('admin_port') else 'host'}"


def open_line(config: ClusterConfig) -> str | None:
    """A sentence for people, where a cluster is open to whoever reaches it; None: it is not."""
    if not config.security.open or not (heard := heard_elsewhere(config)):
        return None
    where = ", ".join(f"{path} {host}" for path, host in heard[:3]) + (", ..." if len(heard) > 3 else "")
    if config.security.tls is not None:
        return f"the cluster is open (security.open): there is no secret, so whoever reaches {where} can {_BESIDE_TLS}"
    return f"the cluster is open (security.open): whoever reaches {where} can use it, and no secret proves who does"


def _check_mooncake(config: ClusterConfig) -> Iterator[str]:
    tier = config.tiers.mooncake
    if tier is None:
        return
    host, _, port = tier.master.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        yield f"tiers.mooncake.master: {tier.master}: expected HOST:PORT of mooncake_master"
    if tier.ttl_s is not None:
        yield "tiers.mooncake.ttl_s: Mooncake gives no key a time of its own; leave it out"
    if tier.rdma_devices and tier.protocol != "rdma":
        yield f"tiers.mooncake.rdma_devices: they are of protocol rdma, and it is {tier.protocol}"


def _check_dialect(config: ClusterConfig) -> Iterator[str]:
    mooncake = config.metadata_server.mooncake
    if (mooncake.cert is None) != (mooncake.key is None):
        missing = "cert" if mooncake.cert is None else "key"
        yield f"metadata_server.mooncake.{missing}: missing; TLS needs a certificate and its key"
    if mooncake.cert is not None and mooncake.port is None:
        yield "metadata_server.mooncake.port: missing; TLS is on a port of its own, as the cluster's nodes speak none"


def _check_ports(config: ClusterConfig) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    for path, host, port in ports_of(config):
        if port == 0:
            continue
        owner = taken.setdefault((host, port), path)
        if owner != path:
            yield f"{path}: {port} on {host} is {owner} already"


def ports_of(config: ClusterConfig) -> Iterator[tuple[str, str, int]]:
    """(path, host, port) of everything of ours that listens; port 0 is any free one."""
    for number, (host, port) in enumerate(routers_of(config)):
        yield f"routers[{number - 1}]" if number else "router.port", host, port
        seen = as_router_at(config, address_of(host, port))
        for at, own in enumerate(own_ports(seen)):
            yield f"{f'routers[{number - 1}]' if number else 'router'}.processes[{at}]", own_host(seen), own
    if config.router.admin_port is not None:
        yield "router.admin_port", config.router.admin_host or config.router.host, config.router.admin_port
    if not config.handoff.traits.has_store:
        return
    server = config.metadata_server
    yield from metadata_ports(server)
    if server.mooncake.enabled and server.mooncake.port is not None:
        yield "metadata_server.mooncake.port", server.host, server.mooncake.port
    for name, node in config.nodes.items():
        yield f"nodes.{name}.port", node.host, node.port
        yield f"nodes.{name}.transfer_port", node.host, node.transfer_port


def metadata_ports(server: MetadataServerConfig) -> Iterator[tuple[str, str, int]]:
    """(path, host, port) of every metadata server."""
    for number, partition in enumerate(partitions_of(server)):
        path = f"metadata_server.partitions[{number}]" if server.partitions else "metadata_server"
        for at, (host, port) in enumerate(servers_of(partition)):
            yield f"{path}.{f'standbys[{at - 1}]' if at else 'port'}", host, port


def _check_cors(config: ClusterConfig) -> Iterator[str]:
    for origin in config.router.cors:
        if origin not in ("*", "loopback") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s@?#]+", origin):
            yield f"router.cors: {origin!r}: expected http://HOST:PORT without a path, loopback or *"


def _contexts(config: ClusterConfig) -> Iterator[tuple[str, int]]:
    """(path, longest context) wherever the file gives one; the model's own is looked at when it is loaded."""
    if not config.handoff.traits.has_store:
        return
    if config.model.max_context is not None:
        yield "model.max_context", config.model.max_context
    for name, node in config.nodes.items():
        if isinstance(node.engine, SimEngineConfig):
            yield f"nodes.{name}.engine.max_context", node.engine.max_context
    if isinstance(config.engine, SimEngineConfig):
        yield "engine.max_context", config.engine.max_context


def _check_bounds(config: ClusterConfig) -> Iterator[str]:
    store, chunk_tokens = config.store, config.kv.chunk_tokens
    for path, context in _contexts(config):
        if chunk_tokens > context:
            yield f"kv.chunk_tokens: {chunk_tokens} is over {path} {context}; no prompt would fill a chunk"
    if store.low_watermark >= store.high_watermark:
        yield (
            f"store.low_watermark: {store.low_watermark} is not below store.high_watermark {store.high_watermark};"
            " eviction starts at the high and ends at the low one"
        )
    kind = config.transport.kind
    if kind in ("ucx", "nixl"):
        return
    if config.transport.devices:
        yield f"transport.devices: only transports ucx and nixl use devices, this is {kind}"
    if config.transport.fallback is not None:
        yield f"transport.fallback: only transports ucx and nixl ever use one, this is {kind}; take it out"
