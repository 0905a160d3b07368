"""KV events as vLLM's own publisher and classes send them, followed by the router's feed."""

import asyncio
import logging
from pathlib import Path

import zmq
import zmq.asyncio
import zmq.utils.monitor
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from kvcore.clock import SystemClock
from kvcore.peer_log import PeerLog
from router.kv_events.feed import EventFeed
from router.routing.told import ToldPrefixes

PROMPT = list(range(64))


def stored(names: list[bytes | int], parent: bytes | int | None, tokens: list[int], salt: str | None) -> BlockStored:
    return BlockStored(
        block_hashes=names,
        parent_block_hash=parent,
        token_ids=tokens,
        block_size=16,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=[(salt,) if salt else None, *[None] * (len(names) - 1)],
        group_idx=0,
        session_id="s",
    )


async def test_a_router_knows_what_vllms_publisher_tells(tmp_path: Path) -> None:
    events, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    publisher = ZmqEventPublisher(0, endpoint=events, replay_endpoint=replay)
    told = ToldPrefixes(["a"])
    said = PeerLog(logging.getLogger("router"), clock=SystemClock())
    feed = asyncio.create_task(EventFeed(zmq, "a", events=events, replay=replay, told=told, said=said).run())

    async def until(count: int | None, salt: bytes = b"") -> None:
        async with asyncio.timeout(60):
            while told.find(PROMPT, salt, {}).by_node.get("a") != count or not told.is_whole("a"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    def publish(*each: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        publisher.publish(KVEventBatch(ts=1.0, events=list(each)))

    try:
        publish(stored([b"1" * 32, b"2" * 32], None, PROMPT[:32], None))
        await until(32)
        publish(stored([b"3" * 32], b"2" * 32, PROMPT[32:48], None), stored([4], None, PROMPT[:16], "salt"))
        await until(48)
        await until(16, b"salt")
        publish(BlockRemoved(block_hashes=[b"2" * 32], medium="GPU", group_idx=0))
        await until(16)
        publish(AllBlocksCleared())
        await until(None)
    finally:
        feed.cancel()
        await asyncio.gather(feed, return_exceptions=True)
        publisher.shutdown()
