"""What of a router changes while it runs, and who goes by it afterwards."""

from pathlib import Path

import msgspec
from support.router_fakes import make_rig

from kvcore.config.routing import DecoderPrefill, RoutingPolicy
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, RouterConfig
from kvcore.types import Role
from router.reload import LIVE, LiveRouter

OTHER: dict[str, object] = {
    "policy": RoutingPolicy.ROUND_ROBIN,
    "min_prefill_tokens": 7,
    "decoder_prefill": DecoderPrefill.NEEDED,
    "attempts": 2,
    "request_timeout_s": 11.0,
    "prefill_timeout_s": 12.0,
    "drain_s": 13.0,
    "first_token_s": None,
    "max_waiting": 3,
    "stall_first_s": 14.0,
    "stall_gap_s": 15.0,
    "probe_interval_s": 16.0,
}


async def test_the_live_settings_are_told_to_all_and_no_other_is_touched():
    assert set(OTHER) == set(LIVE)
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    assert "of `router`: " + ", ".join(f"`{name}`" for name in LIVE) in page
    rig = await make_rig()
    before = rig.dispatcher._services.config
    live, told = LiveRouter(rig.dispatcher._services), list[RouterConfig]()
    live.told += [told.append, rig.prober.go_by, rig.cluster.stalls.go_by]
    new = msgspec.structs.replace(before, **OTHER, max_requests=1)
    node = NodeConfig(role=Role.DECODER, port=1)
    live.take(ClusterConfig(cluster="c", model=ModelConfig(path="m", name="m"), nodes={"d": node}, router=new))
    now = rig.dispatcher._services.config
    assert told == [now] and now.max_requests == before.max_requests
    assert {name: getattr(now, name) for name in LIVE} == {name: getattr(new, name) for name in LIVE}
    assert rig.prober._config is now and rig.cluster.stalls._config is now and rig.cluster.stalls._shortest_s == 14.0
