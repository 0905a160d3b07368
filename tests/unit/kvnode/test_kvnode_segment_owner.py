"""What a node says of its segment."""

from collections.abc import Callable

import pytest

from kvcore.chunk_keys import KEY_BYTES
from kvcore.config.schema import NodeConfig, TransportConfig
from kvcore.types import ChunkKey, Role
from kvnode.segment_owner import SegmentOwner
from kvstore.chunk_format import ALIGNMENT, ChunkHeader, pack
from transfer.memory.segment import SegmentMemory
from transfer.select import SegmentHosts


def header(generation: int) -> bytes:
    key = ChunkKey(generation.to_bytes(KEY_BYTES, "little"))
    return pack(ChunkHeader(key, b"f" * 16, token_count=1, payload_length=64, checksum=0, generation=generation))


async def test_all_that_lies_in_the_segment_is_listed_the_newest_first() -> None:
    node = NodeConfig(role=Role.STORE, port=0, segment=1 << 20)  # type: ignore[arg-type]
    async with SegmentOwner("s0", 1, node, TransportConfig(kind="shm")) as owner:
        for place, generation in enumerate((4, 1, 5, 2, 3)):
            raw = header(generation)
            owner.view[place * ALIGNMENT : place * ALIGNMENT + len(raw)] = raw
        (manifest,) = await owner.manifests()
    assert [entry.generation for entry in manifest.entries] == [5, 4, 3, 2, 1]


async def test_an_address_that_is_sealed_anew_is_announced_and_counts_as_no_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: dict[str, Callable[[], None]] = {}
    announced: list[int] = []

    async def start(
        transport: TransportConfig,
        memory: SegmentMemory,
        *,
        on_change: Callable[[], None],
        on_reseal: Callable[[], None],
        **_: object,
    ) -> SegmentHosts:
        told.update(change=on_change, reseal=on_reseal)
        return SegmentHosts(memory, {})

    monkeypatch.setattr("kvnode.segment_owner.start_segment_hosts", start)
    node = NodeConfig(role=Role.STORE, port=0, segment=1 << 20)  # type: ignore[arg-type]
    async with SegmentOwner("s0", 1, node, TransportConfig(kind="ucx")) as owner:
        owner.on_change = lambda: announced.append(owner.host_restarts)
        told["reseal"]()
        told["change"]()
    assert announced == [0, 1]
