"""States of a reservation as prose and as data, settings on the wire, and what objects say of themselves."""

import re

import msgspec
from support.store_fakes import KEYS, put, views

from kvcore.clock import ManualClock
from kvcore.config.schema import StoreConfig, TransportConfig
from kvstore.limits import StoreLimits
from kvstore.put_session import TRANSITIONS, _State
from kvstore.settings import KVStoreSettings
from metadata_server.connect import MetadataEndpoints
from metadata_server.subscription import IndexSubscription
from transfer.inproc import InprocTransfer


def test_the_table_in_the_docstring_is_the_one_that_the_code_asserts() -> None:
    rows = re.findall(r"^\s*\| (\w+) \| (\w+) \| .+ \|$", _State.__doc__ or "", re.MULTILINE)
    said = {(_State(before), _State(after)) for before, after in rows if before != "from"}
    assert said == {(before, after) for before, states in TRANSITIONS.items() for after in states}


def test_settings_go_into_another_process_and_come_back() -> None:
    settings = KVStoreSettings(
        node_id="d",
        incarnation=7,
        host_id="h",
        metadata=MetadataEndpoints(urls=("http://m:1", "http://m:2"), timeout_s=1.0),
        transport=TransportConfig(),
        store=StoreConfig(),
    )
    raw = msgspec.json.encode(settings, enc_hook=int)
    assert msgspec.json.decode(raw, type=KVStoreSettings, dec_hook=lambda kind, value: kind(value)) == settings


async def test_objects_say_what_they_are_and_hold(world) -> None:
    world.use(ManualClock())
    world.limits = StoreLimits(close_s=0.05)
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    client = "<MetadataClient protocol 1, available>"
    assert repr(store) == f"<KVStore of node a for m: <Placement of a incarnation 1, {client}>>"
    session = await store.begin_put(KEYS, prefer_segment=None, timeout_s=5)
    assert repr(session) == "<PutSession open: 3 granted>"
    await session.write(KEYS[0], 4, views(0), timeout_s=5)
    assert repr(session) == "<PutSession open: 2 granted, 1 written>"
    await session.commit(timeout_s=5)
    await session.aclose()
    assert repr(session) == "<PutSession closed: 1 committed, 2 gone>"
    assert repr(await store.begin_put([], prefer_segment=None, timeout_s=5)) == "<PutSession open: nothing granted>"
    wire.down.add("")
    assert await put(store) == []
    assert "not tried for 0.10 s" in repr(store)


def test_a_subscription_says_where_it_is() -> None:
    subscription = IndexSubscription(None, None, ManualClock())  # type: ignore[arg-type]
    assert repr(subscription) == "<IndexSubscription epoch none, next 0, not connected>"
