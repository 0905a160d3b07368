"""A machine that vanishes without a word in the middle of a batch: no FIN, no RST, nothing ever again."""

import asyncio

import pytest
from support.netns import ADDRESSES, missing_namespaces, two_machines
from support.transfer_child import segment_process
from support.transports import transport_config

from kvcore.errors import PeerUnreachableError
from transfer.base import TransferOp
from transfer.memory.segment import host_identity
from transfer.select import build_transfer

_missing = missing_namespaces()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(_missing), reason=_missing)]
SIZE_BYTES = 64 << 20
NOTICED_S = 30.0
"""`transfer.tcp.sockets` says 6; the batch has 60."""


@pytest.mark.parametrize("direction", ["write", "read"])
async def test_tcp_notices_long_before_the_batchs_deadline(direction: str) -> None:
    with two_machines("wire") as machines, machines.entered():
        engine = build_transfer(transport_config("tcp"), host_identity())
        far = segment_process("far.1", SIZE_BYTES, "tcp", inside=machines.inside[1], host=ADDRESSES[1])
        with far as child:
            move = engine.write if direction == "write" else engine.read
            data = memoryview(bytearray(SIZE_BYTES))
            assert await engine.write([TransferOp(child.segment, 0, [data[:1]])], 10) == [None]
            machines.shape(delay_s=0.05)  # so that the batch is under way for a while
            batch = asyncio.create_task(move([TransferOp(child.segment, 0, [data])], 60))
            await asyncio.sleep(0.2)  # not to wait for something: to be in the middle
            assert not batch.done()
            machines.cut()
            began = asyncio.get_running_loop().time()
            (error,) = await batch
            assert isinstance(error, PeerUnreachableError)
            took_s = asyncio.get_running_loop().time() - began
            assert took_s < NOTICED_S
            print(f"{took_s:.1f} s: {error}")
            await engine.aclose()
