"""From a configuration to an engine, not yet entered, and to the way to the store's index that it needs.

The one place that knows which kinds of engines there are.

torch is imported only when a torch engine is asked for.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from engines.base import Engine
from engines.sim.build import build_sim_engine, sim_grammars
from engines.sim.runner import sim_spec
from kvcore.clock import Clock
from kvcore.config.file import node_config
from kvcore.config.kv_identity import declared_kv
from kvcore.config.schema import ClusterConfig, EngineConfig, SimEngineConfig, TorchEngineConfig
from kvcore.types import KVSpec
from kvstore.store import KVStore

StoreFactory = Callable[[KVSpec], KVStore]
"""Makes the store's client once the KV's provenance is known. Who gave it closes what it made, after the engine."""


def engine_config(config: ClusterConfig, node_name: str) -> EngineConfig:
    """The node's own engine section, else the cluster's. Raises ConfigError for an unknown node."""
    engine = node_config(config, node_name).engine or config.engine
    assert engine is not None, "only a cluster of servers that are not ours has none"
    return engine


def build_engine(config: ClusterConfig, node_name: str, make_store: StoreFactory, clock: Clock) -> Engine:
    """The engine of a node, to be entered. Raises ConfigError for what this build or machine cannot run."""
    engine, chunk_tokens = engine_config(config, node_name), config.kv.chunk_tokens
    timeout_s, declared = config.transport.timeout_s, declared_kv(config)
    if isinstance(engine, SimEngineConfig):
        if config.model.version:
            weights = f"{engine.weights_version}/{config.model.version}"
            engine = msgspec.structs.replace(engine, weights_version=weights)
        name = config.model.name
        store = make_store(sim_spec(engine, name, chunk_tokens, declared))
        folder = Path(config.model.path).expanduser()
        return build_sim_engine(
            engine,
            name,
            chunk_tokens,
            store,
            clock,
            declared=declared,
            store_timeout_s=timeout_s,
            grammars=sim_grammars(engine, folder if folder.is_dir() else None),
            adapters=config.model.adapters,
        )
    assert isinstance(engine, TorchEngineConfig), "vLLM has stores of its own: see engines.process.child"
    from engines.torch.engine import build_torch_engine

    return build_torch_engine(
        config.model, engine, chunk_tokens, make_store, clock, declared=declared, store_timeout_s=timeout_s
    )
