"""What a transport shows of the bytes that pass: all of them once and in order, or fewer; never others."""

import os

import pytest
from support.transfer_rigs import Rig

from transfer.base import TransferOp

SHOWING = ("inproc", "shm", "tcp")
SMALL = [128, *[16 << 10] * 150, 5, *[1000] * 200, 3 << 20]
"""Buffers of an engine whose blocks are small; in shared memory they are copied by way of a larger one."""


@pytest.mark.parametrize("kind", SHOWING)
@pytest.mark.parametrize("cuts", [[128, 300], [128, 3 << 20, 5, (2 << 20) + 1], [0, 128, 0, 1 << 20], SMALL])
async def test_a_read_shows_each_byte_once_and_in_order(kind, cuts):
    data = os.urandom(sum(cuts))
    async with Rig(kind) as rig:
        assert await rig.engine.write([rig.op(4096, data)], 5.0) == [None]
        buffers = [memoryview(bytearray(cut)) for cut in cuts]
        shown: list[bytes] = []
        op = TransferOp(rig.segment, 4096, buffers, lambda part: shown.append(bytes(part)))
        assert await rig.engine.read([op], 5.0) == [None]
        assert b"".join(shown) == data == b"".join(buffers)


@pytest.mark.parametrize("kind", SHOWING)
async def test_each_op_of_a_batch_sees_its_own_bytes(kind):
    async with Rig(kind) as rig:
        data = [os.urandom(2 << 20) for _ in range(3)]
        await rig.engine.write([rig.op(index << 21, part) for index, part in enumerate(data)], 5.0)
        shown: list[list[bytes]] = [[], [], []]
        ops = [
            TransferOp(
                rig.segment,
                index << 21,
                [memoryview(bytearray(2 << 20))],
                lambda part, at=index: shown[at].append(bytes(part)),
            )
            for index in range(3)
        ]
        assert await rig.engine.read(ops, 5.0) == [None] * 3
        assert [b"".join(parts) for parts in shown] == data


@pytest.mark.parametrize("kind", SHOWING)
@pytest.mark.parametrize("cuts", [[128, 3 << 20, 5, 0, (2 << 20) + 1], SMALL])
async def test_a_write_shows_what_it_has_taken(kind, cuts):
    async with Rig(kind) as rig:
        buffers = [memoryview(os.urandom(cut)) for cut in cuts]
        shown: list[bytes] = []
        op = TransferOp(rig.segment, 4096, buffers, lambda part: shown.append(bytes(part)))
        assert await rig.engine.write([op], 5.0) == [None]
        assert b"".join(shown) == b"".join(buffers) == rig.memory.view[4096 : 4096 + sum(cuts)]
