"""Rules of a cluster file that take more than one field. Pure; the bounds of a single field are in its type."""

from collections.abc import Iterator

from kvcore.config import ClusterConfig, EngineConfig, NodeConfig, SimEngineConfig
from kvcore.types import Role

_EVERY_INTERFACE = ("0.0.0.0", "::")
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def check_cluster(config: ClusterConfig) -> list[str]:
    """What is wrong, as `path: explanation`; empty: nothing."""
    return [*_check_engines(config), *_check_nodes(config), *_check_ports(config), *_check_bounds(config)]


def engine_of(config: ClusterConfig, node: NodeConfig) -> EngineConfig | None:
    """The engine that `node` runs: its own, else the cluster's; None for a store."""
    return None if node.role is Role.STORE else node.engine or config.engine


def _check_engines(config: ClusterConfig) -> Iterator[str]:
    engines = {"engine": config.engine}
    engines |= {f"nodes.{name}.engine": node.engine for name, node in config.nodes.items() if node.engine is not None}
    for path, engine in engines.items():
        if config.kv.chunk_tokens % engine.block_size:
            yield (
                f"{path}.block_size: {engine.block_size} does not divide kv.chunk_tokens {config.kv.chunk_tokens};"
                " a chunk is a whole number of blocks"
            )
        if isinstance(engine, SimEngineConfig) and engine.bytes_per_token % 16:
            yield f"{path}.bytes_per_token: {engine.bytes_per_token} is not a multiple of 16"
    kinds = {type(engine_of(config, node)) for node in config.nodes.values()} - {type(None)}
    if len(kinds) > 1:
        yield "engine: the nodes' engines are of several kinds; they could not share KV"


def _check_nodes(config: ClusterConfig) -> Iterator[str]:
    if not any(node.role is Role.DECODER for node in config.nodes.values()):
        yield "nodes: no node has role decoder; a cluster needs at least one (prefillers are optional)"
    for name, node in config.nodes.items():
        if not name or not all(character.isalnum() or character in "-_" for character in name):
            yield f"nodes.{name}: a node's name consists of letters, digits, - and _"
        if name in ("router", "metadata-server"):
            yield f"nodes.{name}: the name stands for the cluster's own {name}; choose another"
        if node.role is Role.STORE and node.engine is not None:
            yield f"nodes.{name}.engine: a store has no engine"
        if node.host in _EVERY_INTERFACE:
            yield f"nodes.{name}.host: {node.host} is every interface; give the address by which the others reach it"
    server = config.metadata_server.host
    if server in _EVERY_INTERFACE and not all(node.host in _THIS_MACHINE for node in config.nodes.values()):
        yield f"metadata_server.host: {server} is every interface; give the address by which the nodes reach it"


def _check_ports(config: ClusterConfig) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    for path, host, port in ports_of(config):
        if port == 0:
            continue
        owner = taken.setdefault((host, port), path)
        if owner != path:
            yield f"{path}: {port} on {host} is {owner} already"


def ports_of(config: ClusterConfig) -> Iterator[tuple[str, str, int]]:
    """(path, host, port) of everything that listens; port 0 is any free one."""
    yield "metadata_server.port", config.metadata_server.host, config.metadata_server.port
    yield "router.port", config.router.host, config.router.port
    for name, node in config.nodes.items():
        yield f"nodes.{name}.port", node.host, node.port
        yield f"nodes.{name}.transfer_port", node.host, node.transfer_port


def _check_bounds(config: ClusterConfig) -> Iterator[str]:
    store = config.store
    if store.low_watermark >= store.high_watermark:
        yield (
            f"store.low_watermark: {store.low_watermark} is not below store.high_watermark {store.high_watermark};"
            " eviction starts at the high and ends at the low one"
        )
    if config.transport.devices and config.transport.kind != "ucx":
        yield f"transport.devices: only transport ucx uses devices, this is {config.transport.kind}"
    if config.transport.fallback == config.transport.kind:
        yield f"transport.fallback: {config.transport.fallback} is the transport itself"
