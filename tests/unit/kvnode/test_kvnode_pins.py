"""What was pinned before a node started is kept on its disk once the metadata server has taken the node in."""

import asyncio
import contextlib

from support.metadata_words import key
from support.tier_rigs import chunk_of, name_of

from kvcore.clock import SystemClock
from kvcore.errors import MetadataUnavailableError
from kvcore.types import ChunkKey
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.pins import DiskPinner
from kvstore.tiers.disk import open_disk
from metadata_server.cache_messages import CACHE_CONTROL, Pin, PinsReply


class Server:
    """A metadata server that is away at first."""

    def __init__(self, protocol: int, pins: list[Pin]) -> None:
        self.protocol, self.calls = protocol, 0
        self._pins = pins

    async def pins(self) -> PinsReply:
        self.calls += 1
        if self.calls == 1:
            raise MetadataUnavailableError("away")
        return PinsReply(num_pins=len(self._pins), pinned_bytes=0, most_bytes=0, pins=self._pins)


async def until(pinner: DiskPinner, done) -> None:
    running = asyncio.create_task(pinner.run())
    try:
        async with asyncio.timeout(60):
            while not done():  # noqa: ASYNC110
                await asyncio.sleep(0)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_pins_of_the_metadata_server_hold_on_the_disk_of_a_node_that_starts(tmp_path):
    tier = await open_disk(tmp_path / "a.slab", 8 << 20, SystemClock())
    await tier.save([chunk_of(name_of(number), 5000) for number in (1, 2, 3)], timeout_s=20)
    pins = [Pin(key=ChunkKey(name_of(number).key), left_s=left_s) for number, left_s in ((1, None), (2, 60.0))]
    server = Server(CACHE_CONTROL, [*pins, Pin(key=key(99))])
    pinner = DiskPinner(server, tier, MoveLimits(retry_s=0.0))
    names = [name_of(number) for number in (1, 2, 3)]
    assert tier.pinned(names) == [False] * 3
    pinner.registered()
    await until(pinner, lambda: any(tier.pinned(names)))
    assert tier.pinned(names) == [True, True, False] and server.calls == 2
    await tier.aclose()


async def test_an_old_metadata_server_is_not_asked(tmp_path):
    tier = await open_disk(tmp_path / "a.slab", 8 << 20, SystemClock())
    server = Server(CACHE_CONTROL - 1, [])
    pinner = DiskPinner(server, tier, MoveLimits())
    pinner.registered()
    await until(pinner, lambda: "to ask" not in repr(pinner))
    assert server.calls == 0
    await tier.aclose()
