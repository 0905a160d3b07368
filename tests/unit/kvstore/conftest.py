import pytest
from support.store_fakes import World


@pytest.fixture
async def world():
    world = World()
    yield world
    await world.aclose()
    if not world.stores or world.stores[0].counters()["left_to_expire"] == 0:
        assert (world.stats().reservations, world.stats().read_leases, world.stats().waiters) == (0, 0, 0)
