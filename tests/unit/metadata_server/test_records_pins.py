"""Pins that outlive the metadata server: what a second one, over the records of the first, keeps from eviction."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.metadata_rigs import DirectTransport, end
from support.metadata_words import UNIT, keys, new_state, put, registration, stored

from kvcore.clock import ManualClock
from kvcore.config.file import load_config
from kvcore.config.records import MemoryRecordsConfig, SqliteRecordsConfig
from kvcore.config.schema import ClusterConfig
from kvcore.errors import MetadataUnavailableError, RecordsUnavailableError
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.messages import ManifestEntry
from metadata_server.records.base import Records
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.memory import memory_records
from metadata_server.records.opening import open_records
from metadata_server.records.pins import PREFIX, PinRecords
from metadata_server.service import create_core

LIMITS = RecordsLimits(pins_at_once=2, sweep_s=0.01)


@asynccontextmanager
async def running_records(clock: ManualClock) -> AsyncIterator[Records]:
    records = memory_records(clock)
    task = asyncio.ensure_future(records.run())
    yield records
    await end(task)


class Server:
    """One life of a metadata server, over records that outlive it."""

    def __init__(self, records: Records, clock: ManualClock) -> None:
        self.pins = PinRecords(records, clock, LIMITS)
        self.core = MetadataCore(new_state(low_watermark=1.0), clock, pins=self.pins)
        self.client = MetadataClient(DirectTransport(self.core), clock, 5.0)


async def started(records: Records, clock: ManualClock) -> Server:
    server = Server(records, clock)
    await server.pins.restore(server.core.state)
    return server


async def listed(server: Server) -> dict[bytes, float | None]:
    return {pin.key: pin.left_s for pin in (await server.client.pins()).pins}


async def test_what_was_pinned_before_a_restart_is_kept_from_eviction_after_it():
    clock = ManualClock()
    async with running_records(clock) as records:
        first = await started(records, clock)
        first.core.state.register(registration("a", units=8), clock.now())
        reply = await first.client.pin(keys(1, 2, 3))
        assert reply.done == 3

        second = await started(records, clock)
        entries = [
            ManifestEntry(key=key, offset=at * UNIT, length=UNIT, generation=1 + at)
            for at, key in enumerate(keys(1, 2, 3, 4))
        ]
        second.core.state.register(registration("a", units=8, entries=entries), clock.now())
        put(second.core.state, "a", list(range(100, 116)), clock.now())
        second.core.state.check_invariants(clock.now())
        assert stored(second.core.state, [1, 2, 3, 4], clock.now()) == [1, 2, 3]


async def test_a_pin_with_an_end_ends_when_it_was_to_end_however_long_the_restart_took():
    clock = ManualClock()
    async with running_records(clock) as records:
        first = await started(records, clock)
        await first.client.pin(keys(1, 2), ttl_s=100.0)
        await first.client.pin(keys(2, 3))
        await first.client.pin(keys(3), ttl_s=10.0, extend=True)
        await first.client.pin(keys(4), ttl_s=30.0)
        clock.advance(40.0)
        second = await started(records, clock)
        (one, two, three) = keys(1, 2, 3)
        assert await listed(second) == {one: 60.0, two: None, three: None}
        clock.advance(60.0)
        assert await listed(second) == {two: None, three: None}
        third = await started(records, clock)
        assert await listed(third) == {two: None, three: None}


async def test_what_was_unpinned_stays_so_and_leaves_no_record():
    clock = ManualClock()
    async with running_records(clock) as records:
        first = await started(records, clock)
        await first.client.pin(keys(1, 2, 3))
        await first.client.unpin(keys(3, 2, 77))
        assert await listed(await started(records, clock)) == {keys(1)[0]: None}
        assert len((await records.listing(PREFIX)).records) == 1


async def test_records_of_pins_whose_time_is_up_are_removed():
    clock = ManualClock()
    async with running_records(clock) as records:
        server = await started(records, clock)
        await server.client.pin(keys(1, 2, 3, 4, 5), ttl_s=5.0)
        await server.client.pin(keys(6))
        again = await started(records, clock)
        clock.advance(6.0)
        sweeping = asyncio.ensure_future(again.pins.run())
        async with asyncio.timeout(60):
            async for _ in records.watch(PREFIX):
                if [record.key for record in (await records.listing(PREFIX)).records] == [PREFIX + keys(6)[0].hex()]:
                    break
        await end(sweeping)


async def test_a_pin_that_cannot_be_written_down_is_told_to_its_caller():
    clock = ManualClock()
    async with running_records(clock) as records:
        server = await started(records, clock)
        await records.aclose()
        with pytest.raises((RecordsUnavailableError, MetadataUnavailableError)):
            await server.client.pin(keys(1))


async def test_of_a_pin_and_an_unpin_at_once_the_records_say_what_the_index_does():
    clock = ManualClock()
    async with running_records(clock) as records:
        server = await started(records, clock)
        calls = [
            asyncio.ensure_future(server.client.unpin(keys(1, 2, 3)) if at % 2 else server.client.pin(keys(1, 2, 3)))
            for at in range(21)
        ]
        await asyncio.gather(*calls)
        assert await listed(await started(records, clock)) == await listed(server) == dict.fromkeys(keys(1, 2, 3))


# --- where they are kept -------------------------------------------------------------------------------------------


def cluster_config(tmp_path, **server: object) -> ClusterConfig:
    import yaml

    file = tmp_path / "cluster.yaml"
    node = {"role": "decoder", "port": 8702}
    whole = {"cluster": "c", "model": {"path": "sim", "name": "sim"}, "engine": {"kind": "sim"}, "nodes": {"d": node}}
    file.write_text(yaml.safe_dump({**whole, "metadata_server": server}))
    return load_config(file)


@pytest.mark.parametrize(
    ("server", "files"),
    [
        ({"port": 8700}, ["kvferry/c/records-8700.sqlite"]),
        ({"port": 0}, []),
        ({"port": 8700, "records": {"kind": "memory"}}, []),
        ({"port": 0, "records": {"kind": "sqlite", "path": "PLACE/other.sqlite"}}, ["other.sqlite"]),
    ],
)
async def test_records_lie_where_the_file_says_and_need_nothing_by_default(tmp_path, monkeypatch, server, files):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if path := server.get("records", {}).get("path"):
        server = {**server, "records": {"kind": "sqlite", "path": path.replace("PLACE", str(tmp_path))}}
    config = cluster_config(tmp_path, **server)
    assert isinstance(config.metadata_server.records, MemoryRecordsConfig | SqliteRecordsConfig)
    records = await open_records(config, ManualClock())
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.sqlite")]
    await records.aclose()
    assert found == files


def test_a_core_without_records_pins_all_the_same(tmp_path):
    core = create_core(cluster_config(tmp_path), ManualClock())
    assert core.state.pins(None, 0.0).num_pins == 0
