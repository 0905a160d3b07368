"""Wires a simulated engine from its configuration."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from llguidance import LLMatcher

from engines.paged.loop import EngineLoop
from engines.paged.options import EngineOptions
from engines.sim.runner import EOS_TOKEN, SimRunner
from kvcore.chunk_keys import adapter_identity
from kvcore.clock import Clock, SystemClock
from kvcore.config.schema import SimEngineConfig
from kvcore.types import DeclaredKV
from kvstore.store import KVStore
from nodeapi.adapters import ServedAdapter
from nodeapi.grammars.compiler import Beside, Grammars
from nodeapi.grammars.vocabulary import byte_vocabulary, folder_vocabulary


def build_sim_engine(
    config: SimEngineConfig,
    model: str,
    chunk_tokens: int,
    store: KVStore | None,
    clock: Clock | None = None,
    *,
    declared: DeclaredKV = (),
    store_timeout_s: float = 30.0,
    grammars: Grammars | None = None,
    adapters: Mapping[str, str] = {},
) -> EngineLoop:
    """An engine to be entered. `store` stays the caller's. `clock`: the system's, unless a simulation has its own.
    `declared`: what else its KV depends on (see KVSpec). `grammars`: `sim_grammars`, or answers cannot follow any.
    `adapters`: names and what stands for their files."""
    options = EngineOptions.of(config, store_timeout_s)
    runner = SimRunner(config, model, chunk_tokens, declared, sim_adapters(adapters))
    return EngineLoop(runner, store, options, clock or SystemClock(), grammars)


def sim_adapters(adapters: Mapping[str, str]) -> list[ServedAdapter]:
    """Adapters of a simulated engine, which has no files: a path of another name stands for other ones."""
    return [
        ServedAdapter(name=name, identity=adapter_identity(name, path.encode()), path=path)
        for name, path in adapters.items()
    ]


def sim_grammars(
    config: SimEngineConfig,
    folder: Path | None = None,
    beside: Beside[LLMatcher] | None = None,
    clock: Clock | None = None,
) -> Grammars:
    """For a simulated engine, whose tokens are those of `folder`; None: bytes. `beside`, `clock`: as Grammars has
    them."""
    read = partial(byte_vocabulary, config.vocab_size, EOS_TOKEN)
    if folder is not None:
        read = partial(folder_vocabulary, folder, config.vocab_size, [EOS_TOKEN])
    return Grammars(read, [EOS_TOKEN], beside=beside, clock=clock)
