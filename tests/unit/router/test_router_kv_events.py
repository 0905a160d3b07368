"""What plain servers tell of their prefix caches: decoded, kept, missed and asked for again, over real ZeroMQ."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio
import zmq.utils.monitor
from msgspec.structs import replace
from support.fake_vllm_server import MODEL, servers, serving
from support.plain_vllm import plain_config, running_router, write_model_folder
from support.ports import free_ports

from kvcore.clock import ManualClock
from kvcore.config.checks import check_cluster
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig
from kvcore.errors import ConfigError
from kvcore.handoff import HandoffKind
from kvcore.peer_log import PeerLog
from kvcore.types import Role
from router.kv_events.feed import EventFeed, EventFeedLimits, event_feeds
from router.kv_events.wire import decode_events
from router.nodes.cluster import Cluster
from router.routing.told import AllBlocksCleared, BlockRemoved, BlockStored, CacheEvent, ToldPrefixes
from router.routing.views import ClusterView, NodeView

PROMPT = list(range(40))
QUICK = EventFeedLimits(replay_s=5.0, again_s=0.02)


def stored(first: int, tokens: list[int], parent: int | None = None, **more: object) -> BlockStored:
    """Blocks of 4 tokens, named from `first` on."""
    names = list(range(first, first + len(tokens) // 4))
    return BlockStored(names, parent, tokens, 4, **more)  # type: ignore[arg-type]


def telling(*events: CacheEvent) -> ToldPrefixes:
    told = ToldPrefixes(["a"])
    told.begin("a")
    told.heard("a", True)
    told.apply("a", 0, events)
    return told


def found(told: ToldPrefixes, prompt: list[int] = PROMPT, salt: bytes = b"") -> dict[str, int]:
    return told.find(prompt, salt, {}).by_node


def test_what_a_server_told_is_found_and_what_it_dropped_is_not() -> None:
    told = telling(stored(1, PROMPT[:16]), stored(5, PROMPT[16:32], parent=4))
    assert found(told) == {"a": 32} and found(told, [*PROMPT[:8], 99, 99, 99, 99, 99]) == {"a": 8}
    assert found(told, PROMPT[:32]) == {"a": 28}, "never the last token"
    told.apply("a", 1, [BlockRemoved([7, 8, 99])])
    assert found(told) == {"a": 24}
    told.apply("a", 2, [AllBlocksCleared()])
    assert found(told) == {} and told.is_whole("a")


def test_salts_adapters_and_images_keep_their_blocks_apart() -> None:
    salted = stored(1, PROMPT[:8], extra_keys=[["s"], None])
    adapter = stored(11, PROMPT[:8], lora_name="l")
    image = stored(21, PROMPT[:12], extra_keys=[None, [["image", 2]], None])
    told = telling(salted, adapter, stored(31, PROMPT[8:12], parent=12))
    assert found(told, salt=b"s") == {"a": 8} and found(told) == {}
    assert found(telling(image)) == {"a": 4}


def test_blocks_that_lie_in_two_places_go_with_the_last_and_other_groups_count_for_nothing() -> None:
    told = telling(stored(1, PROMPT[:8], medium="GPU"), stored(1, PROMPT[:8], medium="CPU"))
    told.apply("a", 1, [BlockRemoved([1, 2], "GPU"), BlockRemoved([1, 2], "CPU", group_idx=1)])
    assert found(told) == {"a": 8}
    told.apply("a", 2, [BlockRemoved([1, 2], "CPU")])
    assert found(told) == {}


def test_of_a_server_that_missed_something_nothing_is_believed_until_it_clears_its_cache() -> None:
    told = telling(stored(1, PROMPT[:8]))
    told.apply("a", 2, [])
    assert not told.is_whole("a") and found(told) == {}
    told.apply("a", 3, [AllBlocksCleared(), stored(1, PROMPT[:4])])
    assert told.is_whole("a") and found(told) == {"a": 4}
    told.heard("a", False)
    assert found(told) == {}


def test_no_more_is_kept_of_one_server_than_may_be() -> None:
    told = ToldPrefixes(["a"], max_blocks=3)
    told.begin("a")
    told.heard("a", True)
    told.apply("a", 0, [stored(1, PROMPT)])
    assert found(told) == {"a": 12}


@pytest.mark.parametrize("as_array", [False, True])
def test_events_are_read_as_maps_and_as_arrays(as_array: bool) -> None:
    fields = {"block_hashes": [b"h" * 32, 7], "parent_block_hash": None, "token_ids": PROMPT[:8], "block_size": 4}
    event = ["BlockStored", *fields.values(), None, "GPU"] if as_array else {"type": "BlockStored", **fields, "new": 1}
    other = ["Other", 1] if as_array else {"type": "Other"}
    first, *rest = decode_events(msgspec.msgpack.encode([1.5, [event, other], 0]))
    assert isinstance(first, BlockStored) and first.block_hashes == [b"h" * 32, 7] and not rest


@pytest.mark.parametrize("batch", [7, [1.0], [1.0, [7]], [1.0, [{"type": "BlockStored", "block_hashes": 3}]]])
def test_nonsense_is_refused(batch: object) -> None:
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        decode_events(msgspec.msgpack.encode(batch))


class Publisher:
    """As vLLM's: publishes batches with their numbers, and keeps the last ones."""

    def __init__(self, ports: tuple[int, int]) -> None:
        context = zmq.asyncio.Context.instance()
        self.ports, self.kept, self.next_seq = ports, list[tuple[int, bytes]](), 0
        self.live, self.replays = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        for socket, port in zip((self.live, self.replays), ports, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"tcp://127.0.0.1:{port}")
        self.asked = 0
        self._task = asyncio.create_task(self._answer())

    async def publish(self, *events: CacheEvent, lost: bool = False) -> None:
        payload = msgspec.msgpack.encode([0.0, list(events), 0])
        self.kept.append((self.next_seq, payload))
        if not lost:
            await self.live.send_multipart([b"", self.next_seq.to_bytes(8, "big"), payload])
        self.next_seq += 1

    async def _answer(self) -> None:
        while True:
            who, _, first = await self.replays.recv_multipart()
            self.asked += 1
            for seq, payload in self.kept:
                if seq >= int.from_bytes(first, "big"):
                    await self.replays.send_multipart([who, b"", b"", seq.to_bytes(8, "big"), payload])
            await self.replays.send_multipart([who, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.live.close()
        self.replays.close()


async def until(told: ToldPrefixes, count: int | None) -> None:
    async with asyncio.timeout(60):
        while found(told).get("a") != count or told.is_whole("a") != (count is not None):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def following(publisher: Publisher) -> AsyncIterator[ToldPrefixes]:
    told = ToldPrefixes(["a"])
    events, replay = (f"tcp://127.0.0.1:{port}" for port in publisher.ports)
    said = PeerLog(logging.getLogger("router"), clock=ManualClock())
    feed = EventFeed(zmq, "a", events=events, replay=replay, told=told, said=said, limits=QUICK)
    task = asyncio.create_task(feed.run())
    try:
        yield told
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def two_ports() -> tuple[int, int]:
    first, second = free_ports(2)
    return first, second


async def test_what_was_told_before_and_what_was_missed_is_asked_for() -> None:
    publisher = Publisher(two_ports())
    await publisher.publish(stored(1, PROMPT[:8]))
    async with following(publisher) as told:
        await until(told, 8)
        await publisher.publish(stored(3, PROMPT[8:12], parent=2), lost=True)
        await publisher.publish(stored(4, PROMPT[12:16], parent=3))
        await until(told, 16)
    await publisher.aclose()


async def test_what_was_replayed_and_then_comes_by_itself_is_nothing_new() -> None:
    publisher = Publisher(two_ports())
    await publisher.publish(stored(1, PROMPT[:4]))
    await publisher.publish(stored(2, PROMPT[4:8], parent=1))
    async with following(publisher) as told:
        await until(told, 8)
        seq, payload = publisher.kept[1]
        await publisher.live.send_multipart([b"", seq.to_bytes(8, "big"), payload])
        await publisher.publish(stored(3, PROMPT[8:12], parent=2))
        await until(told, 12)
        assert publisher.asked == 1
    await publisher.aclose()


async def test_what_the_server_keeps_no_more_is_missed_for_good() -> None:
    publisher = Publisher(two_ports())
    await publisher.publish(stored(1, PROMPT[:8]))
    async with following(publisher) as told:
        await until(told, 8)
        await publisher.publish(stored(3, PROMPT[8:12], parent=2), lost=True)
        publisher.kept.clear()
        await publisher.publish(stored(4, PROMPT[12:16], parent=3))
        await until(told, None)
        await publisher.publish(AllBlocksCleared(), stored(1, PROMPT[:4]))
        await until(told, 4)
    await publisher.aclose()


async def test_a_publisher_that_dies_is_believed_no_more_and_one_that_starts_anew_from_its_beginning() -> None:
    publisher = Publisher(two_ports())
    await publisher.publish(stored(1, PROMPT[:8]))
    await publisher.publish(stored(3, PROMPT[8:12], parent=2))
    async with following(publisher) as told:
        await until(told, 12)
        await publisher.aclose()
        await until(told, None)
        publisher = Publisher(publisher.ports)
        await publisher.publish(stored(1, PROMPT[:4]))
        await until(told, 4)
    await publisher.aclose()


def plain(**node: object) -> ClusterConfig:
    return ClusterConfig(
        cluster="plain",
        handoff=HandoffKind.NIXL,
        model=ModelConfig(path="m", name="m"),
        nodes={"a": NodeConfig(role=Role.DECODER, url="http://127.0.0.1:9", **node)},  # type: ignore[arg-type]
    )


def test_a_router_believes_a_server_that_tells_and_guesses_while_it_does_not() -> None:
    cluster = Cluster(plain(events="tcp://127.0.0.1:5557"), ManualClock())
    view = ClusterView(decoders=(NodeView("a", Role.DECODER, b"kv", 1, 4096),))
    told, prompt = cluster.caches.told, list(range(100))
    assert told is not None

    def known(tokens: list[int]) -> int:
        return cluster.hits(view, tokens, b"")[b"kv"].longest

    cluster.chosen("a", prompt, b"")
    assert known(prompt) == 96, "what it was sent, as it does not tell"
    told.begin("a")
    told.heard("a", True)
    other = list(range(500, 600))
    told.apply("a", 0, [BlockStored([1, 2], None, other[:32], 16)])
    assert (known(other), known(prompt)) == (32, 96), "it is about to have what it was sent last"
    for number in range(700):
        cluster.chosen("a", list(range(1000 * number + 1000, 1000 * number + 1100)), b"")
    assert (known(other), known(prompt)) == (32, 0), "it would have told"
    told.heard("a", False)
    assert (known(other), known(prompt)) == (0, 96)
    cluster.caches.forget("a")
    told.heard("a", True)
    assert (known(other), known(prompt)) == (0, 0)


@pytest.mark.parametrize(
    "node, wrong",
    [
        ({"events": "tcp://*:5557"}, "expected tcp://HOST:PORT"),
        ({"events": "http://h:1"}, "expected tcp://HOST:PORT"),
        ({"events": "tcp://h:70000"}, "expected tcp://HOST:PORT"),
        ({"events_replay": "tcp://h:1"}, "means nothing without events"),
        ({"events": "tcp://h:1", "events_replay": "h:1"}, "nodes.a.events_replay: expected"),
        ({"events": "tcp://[::1]:5557", "events_replay": "tcp://gpu-0.x:5558"}, None),
    ],
)
def test_where_events_are_is_checked(node: dict[str, str], wrong: str | None) -> None:
    problems = [problem for problem in check_cluster(plain(**node)) if "events" in problem]
    assert (wrong in problems[0]) if wrong else not problems


def test_without_pyzmq_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    config = plain(events="tcp://127.0.0.1:5557")
    told = ToldPrefixes(["a"])
    assert [repr(feed) for feed in event_feeds(config, told, ManualClock())] == [
        "<EventFeed of a at tcp://127.0.0.1:5557>"
    ]
    assert not event_feeds(plain(), None, ManualClock())
    monkeypatch.setitem(sys.modules, "zmq.asyncio", None)
    with pytest.raises(ConfigError, match=r"nodes\.a\.events needs pyzmq: pip install 'kvferry\[events\]'"):
        event_feeds(config, told, ManualClock())


async def test_prompts_go_to_the_server_that_tells_that_it_has_their_beginning(tmp_path: Path) -> None:
    """Within a second of its first report. Without its word they go to both by turns."""
    fakes = servers(HandoffKind.NIXL, prefillers=2)
    publisher = Publisher(two_ports())
    prompts = [[number, *range(100, 140)] for number in range(1, 400)]
    for number, prompt in enumerate(prompts):
        await publisher.publish(stored(100 * number, prompt[:40]))
    in_a_row = 0
    async with serving(fakes):
        config = plain_config(fakes, write_model_folder(tmp_path / "model"))
        events, replay = (f"tcp://127.0.0.1:{port}" for port in publisher.ports)
        node = replace(config.nodes["p1"], events=events, events_replay=replay)
        async with running_router(replace(config, nodes={**config.nodes, "p1": node})) as session:
            for prompt in prompts:
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 2}
                async with session.post("/v1/completions", json=body) as reply:
                    assert reply.status == 200, await reply.text()
                there = bool(fakes["p1"].prefills) and fakes["p1"].prefills[-1]["prompt"] == prompt
                in_a_row = in_a_row + 1 if there else 0
                if in_a_row == 6:
                    break
                await asyncio.sleep(0 if there else 0.05)
    await publisher.aclose()
    assert in_a_row == 6
