"""Wires a simulated engine from its configuration."""

from engines.paged.loop import EngineLoop
from engines.paged.options import EngineOptions
from engines.sim.runner import SimRunner
from kvcore.clock import Clock, SystemClock
from kvcore.config.schema import SimEngineConfig
from kvcore.types import DeclaredKV
from kvstore.store import KVStore


def build_sim_engine(
    config: SimEngineConfig,
    model: str,
    chunk_tokens: int,
    store: KVStore | None,
    clock: Clock | None = None,
    *,
    declared: DeclaredKV = (),
    store_timeout_s: float = 30.0,
) -> EngineLoop:
    """An engine to be entered. `store` stays the caller's. `clock`: the system's, unless a simulation has its own.
    `declared`: what else its KV depends on (see KVSpec)."""
    options = EngineOptions.of(config, store_timeout_s)
    return EngineLoop(SimRunner(config, model, chunk_tokens, declared), store, options, clock or SystemClock())
