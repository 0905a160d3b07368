"""What a cluster file says reaches the engine."""

import msgspec
import pytest
from support.fake_engine import cluster_config
from support.sim_loop import run_sim
from support.store_fakes import World

from engines.factory import build_engine
from engines.paged.loop import EngineLoop
from engines.provenance import versioned
from engines.sim.runner import sim_spec
from kvcore.clock import SystemClock
from kvcore.config.schema import SimEngineConfig, TransportConfig
from kvcore.kv_parts import differing_parts
from kvcore.types import KVSpec
from transfer.inproc import InprocTransfer


def test_the_transports_time_for_a_batch_bounds_the_engines_calls_of_the_store() -> None:
    async def main() -> None:
        config = msgspec.structs.replace(cluster_config(), transport=TransportConfig(timeout_s=3.5))
        world = World()
        store, _ = world.store("d0", InprocTransfer(world.memory))
        engine = build_engine(config, "d0", lambda _: store, SystemClock())
        assert isinstance(engine, EngineLoop)
        context = engine._store_jobs._context
        assert context is not None
        assert context.timeout_s == 3.5

    run_sim(main)


@pytest.mark.parametrize(
    ("cause", "settings"),
    [
        ("engine.block_size", {"block_size": 32}),
        ("engine.bytes_per_token", {"bytes_per_token": 128}),
        ("weights", {"weights_version": "v2"}),
    ],
)
def test_what_makes_its_kv_another_kind_is_named_as_in_the_file(cause, settings) -> None:
    plain, other = (sim_spec(SimEngineConfig(**fields), "m", 64) for fields in ({}, settings))
    assert list(differing_parts(plain, other)) == [cause]


def test_a_version_of_the_weights_and_encryption_are_another_kind_of_kv_and_neither_is_what_it_was() -> None:
    async def main() -> None:
        config, world = cluster_config(), World()
        store, _ = world.store("d0", InprocTransfer(world.memory))

        def fingerprint(version: str, *, encrypt: bool = False) -> bytes:
            model = msgspec.structs.replace(config.model, version=version)
            kv = msgspec.structs.replace(config.kv, encrypt=encrypt)
            versioned_config = msgspec.structs.replace(config, model=model, kv=kv)
            made: list[KVSpec] = []
            build_engine(versioned_config, "d0", lambda spec: made.append(spec) or store, SystemClock())
            return made[0].fingerprint

        engine = config.engine
        assert isinstance(engine, SimEngineConfig)
        plain = sim_spec(engine, config.model.name, config.kv.chunk_tokens).fingerprint
        encrypted = fingerprint("", encrypt=True)
        assert fingerprint("") == plain and len({plain, encrypted, fingerprint("a"), fingerprint("b")}) == 4

    run_sim(main)


def test_a_digest_without_a_version_is_what_the_files_say() -> None:
    assert versioned("d", "") == "d" and len({"d", versioned("d", "a"), versioned("d", "b"), versioned("e", "a")}) == 4
