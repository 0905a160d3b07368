"""Each kind of tier, empty and ready, for the conformance suite; and chunks to put into it."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support.mooncake_server import HOST, MooncakeServer, mooncake_server, needs_mooncake
from support.redis_groups import cluster_group, sentinel_group
from support.redis_server import VALKEY, RedisServer, needs_redis, needs_valkey, redis_server
from support.s3_server import needs_s3, s3_server
from support.shared_servers import shared

from kvcore.clock import ManualClock, SystemClock
from kvcore.config.tiers import MooncakeTierConfig, ObjectTierConfig
from kvcore.trust.secrets import Secrets
from kvcore.types import ChunkKey
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, checksum, pack
from kvstore.codecs.tier import CodecTier
from kvstore.integrity.checks import Integrity
from kvstore.tiers.base import ChunkName, Tier, TierChunk, TierOutcome
from kvstore.tiers.disk import open_disk
from kvstore.tiers.limits import ObjectLimits, RedisLimits
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.mooncake.limits import MooncakeLimits
from kvstore.tiers.mooncake.tier import MooncakeTier, place_of
from kvstore.tiers.objects.tier import ObjectTier, open_bucket
from kvstore.tiers.places.opening import open_redis
from kvstore.tiers.redis_parts import part_key

FINGERPRINT = bytes(range(16))
CAPACITY_BYTES = 8 << 20


@dataclass
class TierRig:
    """A tier of about CAPACITY_BYTES, and what a test may do to what lies behind it. None: this kind cannot."""

    tier: Tier
    advance: Callable[[float], None] | None = None
    """Let seconds pass for the tier's TTLs."""
    damage: Callable[[ChunkName], None] | None = None
    """Flip a bit in the stored payload."""
    tear: Callable[[ChunkName], None] | None = None
    """Leave the stored chunk as a writer leaves it that is killed in the middle."""
    stop: Callable[[], None] | None = None
    """Kill the server."""
    start: Callable[[], None] | None = None
    """And start it again, empty or not."""
    freeze: Callable[[], None] | None = None
    """The server stands still: it accepts and answers nothing ..."""
    thaw: Callable[[], None] | None = None
    """... until now."""
    reopen: Callable[[], AbstractAsyncContextManager[Tier]] | None = field(default=None)
    """Another tier over the same place, as another process or the next start has it. The first one is closed before
    where the place belongs to one process."""


@asynccontextmanager
async def memory_rig() -> AsyncIterator[TierRig]:
    clock = ManualClock()
    tier = MemoryTier(CAPACITY_BYTES, clock, max_chunk_bytes=CAPACITY_BYTES)

    def damage(name: ChunkName) -> None:
        value, end = tier.chunks[name]
        tier.chunks[name] = (value[:-1] + bytes([value[-1] ^ 1]), end)

    yield TierRig(tier, advance=clock.advance, damage=damage)
    await tier.aclose()


@asynccontextmanager
async def disk_rig(*, buffered: bool = False) -> AsyncIterator[TierRig]:
    with TemporaryDirectory() as folder:
        path, clock = Path(folder) / "tier.slab", ManualClock()
        tier = await open_disk(path, CAPACITY_BYTES, clock, buffered=buffered)

        def place(name: ChunkName) -> tuple[int, int]:
            entry = tier._index.chunks[name].entry
            return entry.offset, entry.num_bytes

        def overwrite(offset: int, change: Callable[[bytes], bytes], length: int) -> None:
            with path.open("r+b", buffering=0) as file:
                file.seek(offset)
                before = file.read(length)
                file.seek(offset)
                file.write(change(before))

        def damage(name: ChunkName) -> None:
            offset, length = place(name)
            overwrite(offset + length - 1, lambda old: bytes([old[0] ^ 1]), 1)

        def tear(name: ChunkName) -> None:
            offset, length = place(name)
            overwrite(offset + length // 2, lambda old: bytes(len(old)), length - length // 2)

        @asynccontextmanager
        async def reopen() -> AsyncIterator[Tier]:
            await tier.aclose()
            again = await open_disk(path, CAPACITY_BYTES, clock, buffered=buffered)
            yield again
            await again.aclose()

        yield TierRig(tier, advance=clock.advance, damage=damage, tear=tear, reopen=reopen)
        await tier.aclose()


@asynccontextmanager
async def redis_rig(program: str) -> AsyncIterator[TierRig]:
    with redis_server(program=program) as server:
        async with redis_rig_at(server.url, lambda _name: server) as rig:
            rig.stop, rig.start, rig.freeze, rig.thaw = server.stop, server.start, server.freeze, server.thaw
            yield rig


@asynccontextmanager
async def redis_rig_at(url: str, server_of: Callable[[ChunkName], RedisServer]) -> AsyncIterator[TierRig]:
    """`server_of`: who has a chunk's parts."""
    limits = RedisLimits(part_bytes=128 << 10, group_bytes=1 << 20, max_chunk_bytes=CAPACITY_BYTES)
    tier = open_redis(url, 2, SystemClock(), limits)

    def damage(name: ChunkName) -> None:
        server = server_of(name)
        old = server.ask(b"GETRANGE", part_key(name, 0), b"1000", b"1000")
        assert isinstance(old, bytes)
        server.ask(b"SETRANGE", part_key(name, 0), b"1000", bytes([old[0] ^ 1]))

    def tear(name: ChunkName) -> None:
        assert server_of(name).ask(b"DEL", part_key(name, 1)) == 1

    @asynccontextmanager
    async def reopen() -> AsyncIterator[Tier]:
        other = open_redis(url, 2, SystemClock(), limits)
        yield other
        await other.aclose()

    yield TierRig(tier, damage=damage, tear=tear, reopen=reopen)
    await tier.aclose()


@asynccontextmanager
async def sentinel_rig() -> AsyncIterator[TierRig]:
    group = shared(sentinel_group)
    assert group.master.ask(b"FLUSHALL") == b"OK"
    async with redis_rig_at(group.url, lambda _name: group.master) as rig:
        yield rig


@asynccontextmanager
async def cluster_rig() -> AsyncIterator[TierRig]:
    group = shared(cluster_group)
    group.settle()
    for server in group.servers:
        assert server.ask(b"FLUSHALL") == b"OK"

    def on_all(what: Callable[[RedisServer], None]) -> Callable[[], None]:
        def do() -> None:
            for server in group.servers:
                what(server)

        return do

    async with redis_rig_at(group.url, lambda name: group.server_of(part_key(name, 0))) as rig:
        rig.stop, rig.start = on_all(RedisServer.stop), on_all(RedisServer.start)
        rig.freeze, rig.thaw = on_all(RedisServer.freeze), on_all(RedisServer.thaw)
        yield rig


@asynccontextmanager
async def folder_rig() -> AsyncIterator[TierRig]:
    with TemporaryDirectory() as folder:
        async with object_rig(ObjectTierConfig(url=f"file://{folder}/chunks")) as rig:
            yield rig


@asynccontextmanager
async def s3_rig() -> AsyncIterator[TierRig]:
    server = shared(s3_server)
    if not server.runs:  # a test of the module stopped it
        server.start()
    name = server.make_bucket()
    config = ObjectTierConfig(url=f"s3://{name}/some/prefix", endpoint=server.url, timeout_s=2.0)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in server.credentials.items():
            patch.setenv(variable, value)
        async with object_rig(config) as rig:
            rig.stop, rig.freeze, rig.thaw = server.stop, server.freeze, server.thaw

            def start() -> None:
                server.start()
                server.make_bucket(name)

            rig.start = start
            yield rig


@asynccontextmanager
async def object_rig(config: ObjectTierConfig) -> AsyncIterator[TierRig]:
    bucket, clock = open_bucket(config), ManualClock()

    def open_one() -> ObjectTier:
        limits = ObjectLimits(max_chunk_bytes=CAPACITY_BYTES)
        return ObjectTier(open_bucket(config), clock, connections=4, limits=limits)

    def change(name: ChunkName, changed: Callable[[bytes], bytes]) -> None:
        length = bucket.head(name.text).num_bytes
        _, value = bucket.get(name.text, length)
        assert value is not None
        bucket.put(name.text, memoryview(changed(bytes(value))), end=None, overwrite=True)

    def damage(name: ChunkName) -> None:
        change(name, lambda old: old[:-1] + bytes([old[-1] ^ 1]))

    def tear(name: ChunkName) -> None:
        change(name, lambda old: old[: len(old) // 2])

    @asynccontextmanager
    async def reopen() -> AsyncIterator[Tier]:
        other = open_one()
        yield other
        await other.aclose()

    tier = open_one()
    yield TierRig(tier, advance=clock.advance, damage=damage, tear=tear, reopen=reopen)
    await tier.aclose()


def mooncake_tier(server: MooncakeServer, limits: MooncakeLimits = MooncakeLimits()) -> MooncakeTier:
    """Of CAPACITY_BYTES buffer. It lends nothing."""
    return MooncakeTier(place_of(MooncakeTierConfig(master=server.master), HOST), CAPACITY_BYTES, limits)


@asynccontextmanager
async def mooncake_rig() -> AsyncIterator[TierRig]:
    """On a master that all tests of the module share, where nothing lies when the test begins."""
    server = shared(mooncake_server)

    @asynccontextmanager
    async def reopen() -> AsyncIterator[Tier]:
        other = mooncake_tier(server)
        yield other
        await other.aclose()

    with server.machines.entered():
        tier, probe = mooncake_tier(server), chunk_of(name_of(0), 1)
        async with asyncio.timeout(60):
            while await tier.save([probe], timeout_s=20.0) != [TierOutcome.OK]:  # noqa: ASYNC110  (nobody lends yet)
                await asyncio.sleep(0.05)
        await tier.clear([FINGERPRINT, bytes(16), b"\xff" * 16], timeout_s=20.0)
        yield TierRig(tier, stop=server.stop, start=server.start, freeze=server.freeze, thaw=server.thaw, reopen=reopen)
        await tier.aclose()


@asynccontextmanager
async def lossless_rig(under: Callable[[], AbstractAsyncContextManager[TierRig]]) -> AsyncIterator[TierRig]:
    """A codec over another kind's rig: half of each chunk of a test gets smaller."""
    async with under() as rig:
        rig.tier = CodecTier(rig.tier, "lossless")
        reopen_under = rig.reopen

        @asynccontextmanager
        async def reopen() -> AsyncIterator[Tier]:
            assert reopen_under is not None
            async with reopen_under() as tier:
                other = CodecTier(tier)  # with another setting
                yield other
                await other.aclose()

        rig.reopen = reopen if reopen_under is not None else None
        yield rig
        await rig.tier.aclose()


@asynccontextmanager
async def encrypted_rig(under: Callable[[], AbstractAsyncContextManager[TierRig]]) -> AsyncIterator[TierRig]:
    """Each chunk is encrypted on its way into another kind's rig."""
    integrity = Integrity(secrets=Secrets((bytes(range(32)),)))
    async with under() as rig:
        rig.tier = CodecTier(rig.tier, integrity=integrity, encrypt=True)
        reopen_under = rig.reopen

        @asynccontextmanager
        async def reopen() -> AsyncIterator[Tier]:
            assert reopen_under is not None
            async with reopen_under() as tier:
                other = CodecTier(tier, integrity=integrity)  # one that does not encrypt, and can read
                yield other
                await other.aclose()

        rig.reopen = reopen if reopen_under is not None else None
        yield rig
        await rig.tier.aclose()


@dataclass(frozen=True)
class RigKind:
    """How a kind of tier is opened for a test, which of a rig's abilities it has, and the marks of its tests."""

    open: Callable[[], AbstractAsyncContextManager[TierRig]]
    abilities: frozenset[str]
    marks: tuple[pytest.MarkDecorator, ...] = ()


_DISK = frozenset({"bound", "advance", "damage", "tear", "reopen", "lists", "expires"})
_REDIS = frozenset({"damage", "tear", "stop", "start", "freeze", "thaw", "reopen", "lists", "marks", "expires"})
_OBJECT = frozenset({"advance", "damage", "tear", "reopen", "lists", "marks", "expires"})
KINDS = {
    "memory": RigKind(memory_rig, frozenset({"bound", "advance", "damage", "lists", "marks", "expires"})),
    "disk": RigKind(disk_rig, _DISK),
    "disk_buffered": RigKind(lambda: disk_rig(buffered=True), _DISK),
    "redis": RigKind(lambda: redis_rig("redis-server"), _REDIS, needs_redis),
    "mooncake": RigKind(mooncake_rig, frozenset({"stop", "start", "freeze", "thaw", "reopen"}), needs_mooncake),
    "redis_sentinel": RigKind(sentinel_rig, frozenset({"damage", "tear", "reopen"}), needs_redis),
    "redis_cluster": RigKind(cluster_rig, _REDIS, needs_redis),
    "valkey": RigKind(lambda: redis_rig(VALKEY or "valkey-server"), _REDIS, needs_valkey),
    "folder": RigKind(folder_rig, _OBJECT),
    "lossless_memory": RigKind(lambda: lossless_rig(memory_rig), frozenset({"bound", "advance", "damage"})),
    "lossless_disk": RigKind(lambda: lossless_rig(disk_rig), _DISK - {"lists"}),
    "lossless_folder": RigKind(lambda: lossless_rig(folder_rig), _OBJECT - {"lists"}),
    "lossless_redis": RigKind(lambda: lossless_rig(lambda: redis_rig("redis-server")), _REDIS - {"lists"}, needs_redis),
    "encrypted_memory": RigKind(lambda: encrypted_rig(memory_rig), frozenset({"bound", "advance", "damage"})),
    "encrypted_disk": RigKind(lambda: encrypted_rig(disk_rig), _DISK - {"lists"}),
    "encrypted_redis": RigKind(
        lambda: encrypted_rig(lambda: redis_rig("redis-server")), _REDIS - {"lists"}, needs_redis
    ),
    "s3": RigKind(s3_rig, _OBJECT | {"stop", "start", "freeze", "thaw"}, needs_s3),
}
"""A line a kind of tier. `bound`: it has a capacity of its own. `lists`: it knows which generations lie in it; `marks`:
and who uses them. `expires`: it can give a chunk that is there another end."""


def kinds_with(*abilities: str) -> list[object]:
    """For `pytest.mark.parametrize("rig", ..., indirect=True)`: the kinds with all of these."""
    found = [(name, kind) for name, kind in KINDS.items() if kind.abilities.issuperset(abilities)]
    return [pytest.param(name, marks=kind.marks) for name, kind in found]


def name_of(number: int, fingerprint: bytes = FINGERPRINT) -> ChunkName:
    return ChunkName(fingerprint, ChunkKey(number.to_bytes(16, "big")))


def chunk_of(name: ChunkName, payload_bytes: int, *, parts: int = 1, generation: int = 1) -> TierChunk:
    """A chunk with a payload that its name decides, zeros and then random, in `parts` views of different lengths."""
    dice = random.Random(name.key)
    payload = bytes(payload_bytes // 2) + dice.randbytes(payload_bytes - payload_bytes // 2)
    header = ChunkHeader(name.key, name.fingerprint, 64, payload_bytes, checksum([memoryview(payload)]), generation)
    whole = memoryview(bytearray(pack(header) + payload))
    cuts = sorted(dice.sample(range(1, len(whole)), parts - 1))
    return TierChunk(name, [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)])


def room_for(chunk: TierChunk, *, more_bytes: int = 0) -> TierChunk:
    """Memory of the same shape, of other content."""
    views = [memoryview(bytearray(b"\xaa" * view.nbytes)) for view in chunk.memory]
    return TierChunk(chunk.name, [*views, memoryview(bytearray(more_bytes))] if more_bytes else views)


def content(chunk: TierChunk) -> bytes:
    return b"".join(chunk.memory)


def payload_length(chunk: TierChunk) -> int:
    return chunk.num_bytes - HEADER_BYTES
