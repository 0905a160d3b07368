"""Which cluster file the store of an offline LLM runs on: one of its own, or a running cluster's with one more node.

Pure, but for `write_cluster`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml

from kvcore.config.fields import ByteSize
from kvcore.config.file import load_config
from kvcore.config.kv.settings import KVConfig
from kvcore.config.parse import parse_byte_size
from kvcore.config.records import MemoryRecordsConfig
from kvcore.config.schema import (
    ClusterConfig,
    MetadataServerConfig,
    ModelConfig,
    NodeConfig,
    RouterConfig,
    ServiceConfig,
    TransportConfig,
    VllmEngineConfig,
)
from kvcore.config.vllm_options import RESERVED, argument, argument_name
from kvcore.errors import ConfigError
from kvcore.types import Role
from kvferry.machine import size_text
from kvstore.chunk_format import ALIGNMENT, HEADER_BYTES

METADATA_SERVER = "metadata-server"
_PRIVATE_NODE = "store"
_SHORTEST_CHUNK = 128
_NO_ROOM = ByteSize(ALIGNMENT)


@dataclass(frozen=True, slots=True)
class StoreCluster:
    """A cluster file, and which of its processes are started for the LLM."""

    config: ClusterConfig
    node_name: str
    """The store node that the LLM's engine belongs to."""
    started: frozenset[str]
    """Names of the processes that are started; the others are not there, or run already."""

    @property
    def joined(self) -> bool:
        """Whether the cluster is somebody else's."""
        return METADATA_SERVER not in self.started

    @property
    def segment_bytes(self) -> int:
        """Of the LLM's own node."""
        return int(self.config.nodes[self.node_name].segment)


def read_store(store: str | int | Path | ClusterConfig) -> ByteSize | ClusterConfig:
    """`LLM(store=...)`: a size, or the cluster to join. Raises ConfigError."""
    if isinstance(store, str | int):
        try:
            return parse_byte_size(store)
        except ValueError as error:
            if isinstance(store, int) or not Path(store).expanduser().exists():
                raise ConfigError(
                    f"store: {store!r} is neither a size such as 2GiB nor the file of a running cluster"
                ) from error
    config = store if isinstance(store, ClusterConfig) else load_config(store)
    if not config.handoff.traits.has_store:
        raise ConfigError(f"store: the cluster {config.cluster!r} has no store: its handoff is {config.handoff}")
    return config


def private_cluster(model: ModelConfig, segment: ByteSize, chunk_tokens: int, ports: Sequence[int]) -> StoreCluster:
    """A metadata server and one store node on this machine. `ports`: PRIVATE_PORTS free ones."""
    metadata_port, store_port, router_port, engine_port = ports
    config = ClusterConfig(
        cluster="llm",
        model=model,
        engine=VllmEngineConfig(),
        nodes={
            _PRIVATE_NODE: NodeConfig(role=Role.STORE, port=store_port, segment=segment),
            "llm": NodeConfig(role=Role.DECODER, port=engine_port),  # stands for the LLM's own process
        },
        kv=KVConfig(chunk_tokens=chunk_tokens),
        transport=TransportConfig(kind="shm"),
        # vLLM may take every core of this machine for seconds, and nobody else is to be told of the node
        metadata_server=MetadataServerConfig(port=metadata_port, node_ttl_s=15.0, records=MemoryRecordsConfig()),
        router=RouterConfig(port=router_port),
        service=ServiceConfig(drain_s=0.5, start_s=60.0),
    )
    return StoreCluster(config, _PRIVATE_NODE, frozenset({METADATA_SERVER, _PRIVATE_NODE}))


PRIVATE_PORTS = 4
"""How many `private_cluster` takes."""


def joined_cluster(config: ClusterConfig, name: str, host: str, port: int, segment: ByteSize | None) -> StoreCluster:
    """`config` with one more store node, called `name`, at `host:port`. Segment None: one too small for any chunk."""
    node = NodeConfig(role=Role.STORE, host=host, port=port, segment=segment or _NO_ROOM)
    service = msgspec.structs.replace(config.service, drain_s=0.5)  # a node that answers no requests has none to end
    merged = msgspec.structs.replace(config, nodes={**config.nodes, name: node}, service=service)
    return StoreCluster(merged, name, frozenset({name}))


def cluster_arguments(config: ClusterConfig) -> dict[str, object]:
    """Arguments of vLLM that the cluster's KV depends on, by the names of `vllm.LLM`; the user's own win."""
    arguments: dict[str, object] = {"dtype": config.model.dtype}
    if isinstance(config.engine, VllmEngineConfig):
        args = config.engine.args
        given = {name: argument(args, argument_name(name)) for name in _KV_ARGUMENTS}
        arguments |= {name: value for name, value in given.items() if value is not None}
    return arguments


_KV_ARGUMENTS = ("block_size", "kv_cache_dtype", "quantization", "tensor_parallel_size")


def check_arguments(arguments: Mapping[str, object]) -> None:
    """Raises ConfigError for an argument of vllm.LLM that kvferry sets itself, or that its store cannot live with."""
    for name, value in arguments.items():
        plain = argument_name(name)
        if plain in _REFUSED:
            raise ConfigError(f"{name}: {_REFUSED[plain]}")
        if plain not in _ALLOWED and any(plain == known or _stands_for(known, plain) for known in RESERVED):
            raise ConfigError(f"{name}: kvferry sets this itself; leave it out")
        if plain == "load-format" and value == "dummy":
            raise ConfigError(
                "load_format: dummy weights are not those of the files, by which the store tells KV apart"
            )


_FOLDER = "give the folder of that revision as `model`: the store tells KV apart by its files"
_REFUSED = {
    "revision": _FOLDER,
    "code-revision": _FOLDER,
    "kv-offloading-size": "the store is that cache; give `store`",
    "kv-offloading-backend": "the store is that cache; give `store`",
    "enable-sleep-mode": "the store's transports hold the addresses of the KV memory",
}
_ALLOWED = ("tokenizer", "tokenizer-revision", "dtype", "max-model-len", "disable-log-stats")
"""Reserved in a cluster file, where they have other names or the router must know them."""


def _stands_for(known: str, name: str) -> bool:
    return known.endswith("-") and name.startswith(known)


def choose_chunk_tokens(asked: int | None, block_size: int, joined: ClusterConfig | None) -> int:
    """Tokens a chunk. Raises ConfigError for what does not fit vLLM's block size or the cluster."""
    if joined is not None:
        chunk_tokens = joined.kv.chunk_tokens
        if asked not in (None, chunk_tokens):
            raise ConfigError(
                f"chunk_tokens: {asked} is not the cluster's {chunk_tokens}: its KV could not be reused. Leave it out"
            )
    else:
        chunk_tokens = asked or -(-_SHORTEST_CHUNK // block_size) * block_size
    if chunk_tokens < 1 or chunk_tokens % block_size:
        whose = "the cluster's kv.chunk_tokens" if joined is not None else "chunk_tokens"
        raise ConfigError(
            f"{whose}: {chunk_tokens} is not a multiple of vLLM's block size {block_size}; "
            + ("give a block_size that divides it" if joined is not None else "give a multiple, or leave it out")
        )
    return chunk_tokens


def check_room(cluster: StoreCluster, kv_bytes_per_token: int) -> None:
    """Raises ConfigError for a segment without room for one chunk, unless it is to have none."""
    if cluster.joined and cluster.segment_bytes == _NO_ROOM:
        return
    tokens = cluster.config.kv.chunk_tokens
    chunk = -(-(HEADER_BYTES + tokens * kv_bytes_per_token) // ALIGNMENT) * ALIGNMENT
    if cluster.segment_bytes < chunk:
        name = "segment" if cluster.joined else "store"
        raise ConfigError(
            f"{name}: {size_text(cluster.segment_bytes)} has no room for one chunk: {tokens} tokens of this model are "
            f"{size_text(chunk)}. Give some hundred times that"
        )


def write_cluster(config: ClusterConfig, file: Path) -> None:
    """As YAML that `load_config` reads back as an equal config."""
    file.write_text(yaml.safe_dump(msgspec.to_builtins(config, enc_hook=_plain), sort_keys=False), encoding="utf-8")


def _plain(value: object) -> int:
    assert isinstance(value, ByteSize), type(value)
    return int(value)
