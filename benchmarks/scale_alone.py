"""What benchmarks.scale measures without a server's process: the index, a router's copy of it, many nodes."""

import gc
import os
import time

import msgspec

from benchmarks.metadata import resident
from benchmarks.scale_nodes import manifest
from kvcore.config.schema import StoreConfig
from kvcore.types import ChunkKey, NodeInfo, Role
from metadata_server.account_messages import ImportRequest
from metadata_server.index.state import MetadataState
from metadata_server.messages import HeartbeatRequest, LeaveRequest, RegisterRequest, SegmentManifest
from router.routing.index import PrefixIndex

Found = dict[str, float]


def alone(objects: list[int]) -> Found:
    """The index in this process: memory and collections as it grows, and the server's pause when its nodes die. Times
    are the processor's, so that other work beside does not count."""
    state, found, numbers = MetadataState(StoreConfig(), 3600.0, "e", 1 << 40), Found(), 0
    gc.collect()
    gc.freeze()  # as a server does before it serves
    before = resident()
    for count in objects:
        while state.num_objects < count:
            _tell(state, f"m{numbers}", min(65_536, count - state.num_objects))
            numbers += 1
        name = f"{count / 1e6:g}M chunks"
        gc.collect(1)
        began = time.process_time()
        gc.collect()
        found[f"a full collection at {name}, s"] = time.process_time() - began
        found[f"bytes a chunk at {name}"] = (resident() - before) / state.num_objects
    pauses = []
    for number in range(min(11, numbers)):
        began = time.process_time()
        state.leave(LeaveRequest(node_id=f"m{number}", incarnation=1), 0.0)
        pauses.append(time.process_time() - began)
    while True:
        began = time.process_time()
        more = state.sweep()
        pauses.append(time.process_time() - began)
        if not more:
            break
    found[f"longest go of the server, {min(11, numbers)} deaths, s"] = max(pauses)
    return found


def crowd(count: int) -> Found:
    """What grows with the nodes alone: /v1/stats of so many, and a heartbeat. Of the processor."""
    state = MetadataState(StoreConfig(), 3600.0, "e", 1 << 40)
    for number in range(count):
        told = manifest(f"c{number}", 1)
        info = NodeInfo(id=f"c{number}", role=Role.STORE, control_url=f"http://c{number}", incarnation=1)
        empty = [SegmentManifest(segment=told.segment)]
        state.register(RegisterRequest(node=info, segments=empty, ttl_s=3600), 0.0)
    began = time.process_time()
    size = len(msgspec.msgpack.encode(state.stats(0.0, 0)))
    took, began = time.process_time() - began, time.process_time()
    for number in range(count):
        state.heartbeat(HeartbeatRequest(node_id=f"c{number}", incarnation=1), 0.0)
    beat = (time.process_time() - began) / count
    name = f"{count:,} nodes"
    return {
        f"/v1/stats of {name}, s": took,
        f"/v1/stats of {name}, MB": size / 1e6,
        f"a heartbeat of {name}, us": beat * 1e6,
    }


def routers(keys: int, segments: int) -> Found:
    """A router's copy of the index: bytes a key where chunks lie in so many segments."""
    gc.collect()
    index, before = PrefixIndex(segments), resident()
    each = keys // segments
    for number in range(segments):
        index.store(f"n{number}", [ChunkKey(os.urandom(16)) for _ in range(each)], f"n{number}.1")
    return {f"bytes a key in a router, {segments:,} segments": (resident() - before) / (each * segments)}


def _tell(state: MetadataState, name: str, chunks: int) -> None:
    told = manifest(name, chunks)
    info = NodeInfo(id=name, role=Role.STORE, control_url=f"http://{name}", incarnation=1)
    empty = [SegmentManifest(segment=told.segment)]
    reply = state.register(RegisterRequest(node=info, segments=empty, ttl_s=3600, in_pieces=True), 0.0)
    number = reply.wanted[told.segment.id]
    for start in range(0, chunks, 4096):
        piece = ImportRequest(
            node_id=name,
            incarnation=1,
            segment_id=told.segment.id,
            number=number,
            entries=told.entries[start : start + 4096],
            last=start + 4096 >= chunks,
        )
        assert state.import_piece(piece, 0.0).refused == 0
