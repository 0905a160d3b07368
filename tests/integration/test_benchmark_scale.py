"""benchmarks.scale at a small size: real processes, a restart, snapshots, deaths, and what its result is called."""

import pytest

from benchmarks.scale import measure, result


@pytest.mark.slow
async def test_nodes_are_back_after_a_restart_and_what_died_is_forgotten() -> None:
    found = await measure([3], 5000, subscribers=[2], deaths=[1], objects=[10_000])
    told = result(found, 3)
    assert told.keys() == {
        "restart_3_nodes_s",
        "longest_stats_s",
        "wrongly_expired",
        "gc_pause_s",
        "node_down_pause_s",
    }
    assert told["wrongly_expired"] == 0
    assert told["node_down_pause_s"] > 0 and 0 < told["gc_pause_s"] < told["restart_3_nodes_s"] < 60
    assert found["2 snapshots at once, MB"] * 1e6 >= 2 * 3 * 5000 * 16, "each subscriber has all keys"
