"""Whether documents of a kind are reused, at the metadata server: what is kept, of two the right one, over restarts."""

import asyncio

import pytest
from support.metadata_rigs import DirectTransport, end
from support.metadata_words import new_state
from support.partition_rigs import PartitionRig

from kvcore.clock import ManualClock
from kvcore.errors import MetadataUnavailableError, RecordsUnavailableError
from metadata_server.cache_messages import BlendSwitchesRequest, KindSwitch
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.records.base import Records
from metadata_server.records.memory import memory_records
from metadata_server.records.switches import BlendSwitches


def switch(kind: str, number: int, off: str = "") -> KindSwitch:
    return KindSwitch(model="m", kind=kind, number=number, off=off, at=float(number))


async def told(core: MetadataCore, *switches: KindSwitch) -> list[KindSwitch]:
    client = MetadataClient(DirectTransport(core), ManualClock(), 5.0)
    return (await client.blend_switches(BlendSwitchesRequest(switches=list(switches)))).switches


def server(records: Records | None = None) -> MetadataCore:
    return MetadataCore(new_state(), ManualClock(), switches=BlendSwitches(records))


async def test_what_was_turned_outlives_the_metadata_server():
    records = memory_records(ManualClock())
    flushing = asyncio.ensure_future(records.run())
    await told(server(records), switch("field", 1, "it was bad"), switch("part", 2))
    assert await told(server(records)) == [switch("field", 1, "it was bad"), switch("part", 2)]
    await end(flushing)


async def test_of_two_about_one_kind_the_later_is_kept_and_of_two_at_once_the_one_that_is_off():
    core = server()
    off, on, again = switch("field", 1, "bad"), switch("field", 2), switch("field", 2, "bad again")
    assert await told(core, off) == [off]
    assert await told(core, on) == [on] == await told(core, off)
    assert await told(core, again) == [again] == await told(core, on)


async def test_of_two_routers_that_tell_at_once_nothing_is_lost():
    records = memory_records(ManualClock())
    flushing = asyncio.ensure_future(records.run())
    core = server(records)
    await asyncio.gather(*(told(core, switch(kind, 1, "bad")) for kind in ("field", "part", "separator")))
    assert [one.kind for one in await told(core)] == ["field", "part", "separator"]
    await end(flushing)


async def test_what_cannot_be_written_down_is_no_answer():
    records = memory_records(ManualClock())
    core = server(records)
    await records.aclose()
    with pytest.raises((RecordsUnavailableError, MetadataUnavailableError)):
        await told(core, switch("field", 1, "bad"))


async def test_each_partition_keeps_it_and_one_that_was_away_is_told_the_next_time():
    rig = PartitionRig(("a", "b"))
    off = switch("field", 1, "bad")
    rig.ways[0].away = True
    assert (await rig.client.blend_switches(BlendSwitchesRequest(switches=[off]))).switches == [off]
    rig.ways[0].away = False
    rig.clock.advance(60.0)  # it was left alone for a while
    assert (await rig.client.blend_switches(BlendSwitchesRequest(switches=[]))).switches == [off]
    await rig.client.blend_switches(BlendSwitchesRequest(switches=[off]))
    assert [await told(core) for core in rig.cores] == [[off], [off]]
    await rig.client.aclose()
