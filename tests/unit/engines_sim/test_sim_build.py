"""What a cluster file says reaches the engine."""

import msgspec
import pytest
from support.fake_engine import cluster_config
from support.sim_loop import run_sim
from support.store_fakes import World

from engines.factory import build_engine
from engines.paged.loop import EngineLoop
from engines.sim.runner import sim_spec
from kvcore.clock import SystemClock
from kvcore.config.schema import SimEngineConfig, TransportConfig
from kvcore.kv_parts import differing_parts
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
