"""The scheduler half's questions to the index, asked of a real metadata server from a thread."""

import asyncio
import threading

from support.metadata_rigs import metadata_rig
from support.store_fakes import SPEC, key

from engines.vllm.connector.lookup import StoreLookup
from engines.vllm.connector.settings import ConnectorSettings, Provenance
from kvcore.config.schema import StoreConfig, TransportConfig
from kvstore.settings import KVStoreSettings
from metadata_server.connect import MetadataEndpoints


def settings(url: str) -> ConnectorSettings:
    return ConnectorSettings(
        store=KVStoreSettings(
            node_id="d",
            incarnation=1,
            host_id="h",
            metadata=MetadataEndpoints(urls=(url,), timeout_s=1.0),
            transport=TransportConfig(),
            store=StoreConfig(),
        ),
        chunk_tokens=SPEC.chunk_tokens,
        save_output=True,
        provenance=Provenance(model_id="m", weights_digest="w", tokenizer_digest="t", attention="a"),
    )


def ended(lookup: StoreLookup) -> bool:
    return lookup._thread not in threading.enumerate()


def test_an_index_that_cannot_be_reached_has_nothing_and_nobody_waits_for_ever() -> None:
    lookup = StoreLookup(settings("http://127.0.0.1:9"), 1)
    try:
        lookup.ask("r", [key(1)])
        assert lookup.answer("r", wait_s=5.0) == 0
    finally:
        lookup.close()
    assert ended(lookup)


def test_a_request_without_keys_is_answered_at_once_and_one_forgotten_has_nothing() -> None:
    lookup = StoreLookup(settings("http://127.0.0.1:9"), 1)
    try:
        lookup.ask("r", [])
        assert lookup.answer("r", wait_s=0.0) == 0
        assert repr(lookup) == "<StoreLookup of 1 ranks, 1 requests, 0 without an answer>"
        lookup.forget("r")
        lookup.forget("never asked")
        assert lookup.answer("r", wait_s=0.0) == 0
    finally:
        lookup.close()
        lookup.close()
    assert ended(lookup)


async def test_it_never_waits_longer_than_it_may() -> None:
    lookup = StoreLookup(settings("http://127.0.0.1:9"), 1)
    lookup._loop.call_soon_threadsafe(lookup._loop.stop)  # whoever would answer is gone
    lookup._thread.join(5.0)
    lookup._answers["r"] = None
    assert lookup.answer("r", wait_s=0.01) is None


async def test_a_running_server_is_asked_for_all_ranks() -> None:
    async with metadata_rig("http") as rig:
        lookup = StoreLookup(settings(str(rig.url)), 2)
        try:
            lookup.ask("r", [key(1), key(2)])
            assert await asyncio.to_thread(lookup.answer, "r", wait_s=5.0) == 0
        finally:
            lookup.close()


async def test_the_answer_to_an_earlier_lookup_of_a_request_is_dropped(monkeypatch) -> None:
    lookup = StoreLookup(settings("http://127.0.0.1:9"), 1)
    first_may_end, found = asyncio.Event(), {bytes(key(1)): 7, bytes(key(2)): 3}

    async def match(keys, rank):
        if keys == [key(1)]:
            await first_may_end.wait()
        return found[bytes(keys[0])]

    monkeypatch.setattr(lookup, "_match", match)
    try:
        lookup.ask("r", [key(1)])
        lookup.ask("r", [key(2)])
        assert await asyncio.to_thread(lookup.answer, "r", wait_s=5.0) == 3
        lookup._loop.call_soon_threadsafe(first_may_end.set)
        lookup.ask("later", [key(2)])
        assert await asyncio.to_thread(lookup.answer, "later", wait_s=5.0) == 3
        assert lookup.answer("r", wait_s=0.0) == 3
    finally:
        lookup.close()
