"""Wires a simulated engine from its configuration."""

from engines.paged.loop import EngineLoop, EngineOptions
from engines.sim.runner import SimRunner
from kvcore.clock import Clock, SystemClock
from kvcore.config import SimEngineConfig
from kvstore.store import KVStore


def build_sim_engine(
    config: SimEngineConfig, model: str, chunk_tokens: int, store: KVStore | None, clock: Clock | None = None
) -> EngineLoop:
    """An engine to be entered. `store` stays the caller's. `clock`: the system's, unless a simulation has its own."""
    options = EngineOptions(
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
        max_waiting=config.max_waiting,
        save_output=config.save_output,
    )
    return EngineLoop(SimRunner(config, model, chunk_tokens), store, options, clock or SystemClock())
