"""What MACs and encryption of chunks cost: each figure with checksums, with MACs and encrypted, by turns, for
`benchmarks.trust`.

Estimate: AES-256-GMAC goes over bytes in the cache at 20 to 30 GB/s where there is VAES, XXH3 at 35 to 100, a copy at
10 to 20. So a get of 64 MiB over shm takes a fifth longer with a MAC; over tcp (2 to 3 GB/s) and from a disk (1 to 3
GB/s) it hardly shows. Handing the parts to another thread, which computes the MAC beside the next copy, was slower with
two cores, which both copy already. The library (cryptography 50) lets go of the interpreter's lock: see two threads.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from benchmarks.children import child
from benchmarks.handoff import BLOCKS, CALL_S, CONFIG, Payload, one_round
from kvcore.clock import SystemClock
from kvcore.config.schema import StoreConfig, TransportConfig
from kvcore.trust.secrets import Secrets
from kvcore.types import ChunkKey, NodeInfo, Role, Segment
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.loader import LoadPlan, TierLoader
from kvnode.tiers.own_segment import OwnSegment
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, pack
from kvstore.codecs.cipher import decrypted, encrypted
from kvstore.codecs.frame import FRONT_BYTES, CodecKind, Frame, parse_frame
from kvstore.integrity.checks import Integrity
from kvstore.integrity.mac import mac_of
from kvstore.placement import Placement
from kvstore.store import KVStore
from kvstore.tiers.base import ChunkName, TierChunk, TierOutcome
from kvstore.tiers.disk import open_disk
from kvstore.tiers.guarded import GuardedTier
from metadata_server.client import MetadataClient
from metadata_server.connect import MetadataEndpoints, connect_client
from metadata_server.messages import RegisterRequest, SegmentManifest
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import build_transfer

SIZE_MIB = 64
_SMALL_BLOCKS = 128
"""Of a chunk: as of an engine that keeps each layer's blocks apart."""
_SECRETS = Secrets((os.urandom(32),))
MODES = {
    "checksum": Integrity(),
    "mac": Integrity("mac", _SECRETS),
    "encrypt": Integrity("mac", _SECRETS, encrypt=True),
}
_FINGERPRINT = bytes(range(16))
_HEADER = ChunkHeader(ChunkKey(bytes(16)), _FINGERPRINT, 256, SIZE_MIB << 20, 0, 1)
_PROMOTED, _PROMOTED_BYTES = 16, 4 << 20


async def measure_chunks(rounds: int) -> dict[str, float]:
    """Print the tables; returns the keys of RESULT."""
    result = rates(rounds) | encryption(rounds)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "cluster.yaml"
        config.write_text(CONFIG)
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(
                child(["-m", "metadata_server", "--config", str(config)], r"url=\"?(http://[^\s\"]+)")
            )
            owner = await stack.enter_async_context(
                child(["-m", "benchmarks.handoff", "--own-segment"], r"^segment (.*)")
            )
            client = connect_client(MetadataEndpoints(urls=(server.said,), timeout_s=CALL_S), SystemClock())
            stack.push_async_callback(client.aclose)
            result |= await gets(client, msgspec.json.decode(owner.said, type=Segment), rounds)
            result |= await promotions(client, Path(folder), rounds)
    return result


def rates(rounds: int) -> dict[str, float]:
    """Of one thread over 64 MiB, but for the last, in GB/s."""
    source, target = (np.frombuffer(bytearray(os.urandom(SIZE_MIB << 20)), np.uint8) for _ in range(2))
    view = memoryview(source)
    halves, pool = (view[: len(view) // 2], view[len(view) // 2 :]), ThreadPoolExecutor(2)
    steps: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(target, source),
        "xxh3": lambda: xxhash.xxh3_64_intdigest(view),
        "mac": lambda: mac_of(bytes(32), _HEADER, [view]),
        "mac_two_threads": lambda: list(pool.map(lambda half: mac_of(bytes(32), _HEADER, [half]), halves)),
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            taken[name].append((SIZE_MIB << 20) / (time.perf_counter() - began) / 1e9)
    found = {f"{name}_gbps": round(statistics.median(values), 2) for name, values in taken.items()}
    print("over 64 MiB: " + ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    pool.shutdown()
    return {name: found[name] for name in ("mac_gbps", "mac_two_threads_gbps")}


def encryption(rounds: int) -> dict[str, float]:
    """Of one thread, chunks of 4 MiB, in GB/s."""
    body, into = (memoryview(bytearray(os.urandom(_PROMOTED_BYTES))) for _ in range(2))
    integrity, header = MODES["mac"], replace(_HEADER, payload_length=_PROMOTED_BYTES)
    assert integrity.secrets is not None
    taken: dict[str, list[float]] = {"encrypt_gbps": [], "decrypt_gbps": []}
    for _ in range(8 * rounds):
        began = time.perf_counter()
        value = encrypted(integrity, header, Frame(CodecKind.NONE, 1, 0), body)
        middle = time.perf_counter()
        frame = parse_frame(value[HEADER_BYTES:FRONT_BYTES])
        assert frame is not None
        opened = decrypted(integrity.secrets.newest, header, frame, value[FRONT_BYTES:], into)
        ended = time.perf_counter()
        assert opened is not None and into == body
        for name, seconds in (("encrypt_gbps", middle - began), ("decrypt_gbps", ended - middle)):
            taken[name].append(_PROMOTED_BYTES / seconds / 1e9)
    found = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    print("one thread, chunks of 4 MiB: " + ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


async def gets(client: MetadataClient, segment: Segment, rounds: int) -> dict[str, float]:
    """64 MiB in chunks of 8 MiB, put into another process's segment and read back."""
    node = NodeInfo(id="n0", role=Role.STORE, control_url="http://127.0.0.1:1", incarnation=1)
    await client.register(RegisterRequest(node=node, segments=[SegmentManifest(segment=segment)], ttl_s=600))
    number, result = 1, dict[str, float]()
    for kind, blocks, suffix in (("shm", BLOCKS, ""), ("shm", _SMALL_BLOCKS, "_small"), ("tcp", BLOCKS, "_tcp")):
        payload = Payload(SIZE_MIB, blocks)
        transfer = build_transfer(TransportConfig(kind=kind), segment.host_id)
        stores = {
            mode: KVStore(
                spec=payload.spec(),
                node_id="n0",
                incarnation=1,
                metadata=client,
                transfer=transfer,
                clock=SystemClock(),
                integrity=integrity,
            )
            for mode, integrity in MODES.items()
        }
        taken: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for at in range(rounds + 1):
            for mode, store in stores.items():
                found = await one_round(store, payload, number)
                number += 1
                if at:
                    taken[mode].append(found)
        for phase, name in (("read", "get"), ("write", "put")):
            times = {mode: [one[phase] for one in all_of] for mode, all_of in taken.items()}
            ratio, encrypted_ratio = _ratio(times, "checksum", "mac"), _ratio(times, "mac", "encrypt")
            shown = ", ".join(f"{mode} {statistics.median(values) * 1e3:.2f} ms" for mode, values in times.items())
            ratios = f"mac/checksum {ratio:.2f}, encrypt/mac {encrypted_ratio:.2f}"
            buffers = f"buffers of {payload.chunk_bytes // blocks >> 10} KiB"
            print(f"{kind} {name} of 64 MiB, {buffers}: {shown}; {ratios}", flush=True)
            result[f"mac_over_checksum_{name}{suffix}"] = ratio
            result[f"encrypt_over_mac_{name}{suffix}"] = encrypted_ratio
        for store in stores.values():
            await store.aclose()
        await transfer.aclose()
    return result


async def promotions(client: MetadataClient, folder: Path, rounds: int) -> dict[str, float]:
    """16 chunks of 4 MiB from a disk's slab into a segment: found, loaded, checked, committed."""
    clock, seconds = SystemClock(), dict[str, list[float]]()
    info = NodeInfo(id="p", role=Role.STORE, control_url="http://127.0.0.1:2", incarnation=1)
    tier = GuardedTier(await open_disk(folder / "tier.slab", 512 << 20, clock), clock, in_flight_bytes=256 << 20)
    body = os.urandom(_PROMOTED_BYTES - HEADER_BYTES)
    with SegmentMemory.create("p.1", 512 << 20) as memory:
        segment = Segment(
            id="p.1", node_id="p", size_bytes=memory.size_bytes, host_id=host_identity(), addresses={"shm": "here"}
        )
        await client.register(RegisterRequest(node=info, segments=[SegmentManifest(segment=segment)], ttl_s=600))
        placement = Placement(client, node_id="p", incarnation=1, clock=clock, config=StoreConfig())
        for at in range(rounds + 1):
            for mode, integrity in MODES.items():
                loader = TierLoader(
                    OwnSegment(memory.view, "p.1", placement, integrity),
                    {tier.name: CALL_S},
                    clock,
                    run_blocking=asyncio.to_thread,
                    limits=MoveLimits(batch_bytes=_PROMOTED * _PROMOTED_BYTES),
                )
                names = [ChunkName(_FINGERPRINT, ChunkKey(os.urandom(16))) for _ in range(_PROMOTED)]
                chunks = [TierChunk(name, [memoryview(_sealed(name, body, integrity))]) for name in names]
                if await tier.save(chunks, timeout_s=CALL_S) != [TierOutcome.OK] * _PROMOTED:
                    raise SystemExit(f"nothing was saved: {tier.stats().problem}")
                began = time.perf_counter()
                got = await loader.load(LoadPlan(names, [[tier]] * _PROMOTED), _PROMOTED_BYTES, clock.now() + CALL_S)
                if at:
                    seconds.setdefault(mode, []).append(time.perf_counter() - began)
                if got.num_there != _PROMOTED:
                    raise SystemExit(f"not all came: {loader.counts}")
        await placement.aclose(1.0)
        await tier.aclose()
    ratio, encrypted_ratio = _ratio(seconds, "checksum", "mac"), _ratio(seconds, "mac", "encrypt")
    shown = ", ".join(f"{mode} {statistics.median(values) * 1e3:.1f} ms" for mode, values in seconds.items())
    ratios = f"mac/plain {ratio:.2f}, encrypt/mac {encrypted_ratio:.2f}"
    print(f"promotion of 64 MiB from a disk: {shown}; {ratios}", flush=True)
    return {"promote_mac_over_plain": ratio, "promote_encrypt_over_mac": encrypted_ratio}


def _ratio(seconds: Mapping[str, Sequence[float]], before: str, after: str) -> float:
    """The rate of the one over that of the other, turn by turn."""
    return round(statistics.median(a / b for a, b in zip(seconds[before], seconds[after], strict=True)), 3)


def _sealed(name: ChunkName, body: bytes, integrity: Integrity) -> bytes:
    header = ChunkHeader(name.key, name.fingerprint, 256, len(body), 0, 1)
    if not integrity.encrypt:
        return pack(integrity.seal(header, [memoryview(body)])) + body
    into = memoryview(bytearray(len(body)))
    return pack(integrity.encrypted(header, [memoryview(body)], into)) + into
