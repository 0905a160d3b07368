import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError, PeerUnreachableError, TransferTimeoutError
from kvcore.types import Segment
from transfer.base import TransferOp, transport_for
from transfer.inproc import InprocFault, InprocTransfer
from transfer.memory.segment import SegmentMemory
from transfer.select import TransferSelector, build_transfer, start_segment_hosts
from transfer.stripes import stripe


def segment(host_id: str = "here", **addresses: str) -> Segment:
    return Segment(id=f"n.{host_id}", node_id="n", size_bytes=64, host_id=host_id, addresses=addresses)


@pytest.mark.parametrize("kind", ["ucx", "rdma"])
async def test_transports_that_this_build_lacks_are_config_errors(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"transport\.kind"):
        build_transfer(TransportConfig(kind=kind), "here")  # type: ignore[arg-type]


@pytest.mark.parametrize("fallback", ["ucx", "nixl", "carrier pigeon"])
async def test_a_fallback_that_could_be_missing_itself_is_refused_on_both_sides(fallback: str) -> None:
    config = TransportConfig(kind="ucx", devices=["mlx5_77"], fallback=fallback)  # type: ignore[arg-type]
    refusal = rf"transport\.fallback: '{fallback}' is not one of auto, shm, tcp"
    with pytest.raises(ConfigError, match=refusal):
        build_transfer(config, "here")
    with SegmentMemory.create("n.1", 4096) as memory, pytest.raises(ConfigError, match=refusal):
        await start_segment_hosts(config, memory, host="127.0.0.1")


async def test_ucx_with_a_written_fallback_uses_that() -> None:
    engine = build_transfer(TransportConfig(kind="ucx", fallback="tcp"), "here")
    assert engine.kind == "tcp"
    await engine.aclose()


async def test_forced_transport_never_falls_back() -> None:
    engine = build_transfer(TransportConfig(kind="shm"), "here")
    elsewhere = segment("there", shm="1:2", tcp="127.0.0.1:1")
    (error,) = await engine.read([TransferOp(elsewhere, 0, [memoryview(bytearray(4))])], 1)
    assert isinstance(error, PeerUnreachableError)
    assert "transport shm" in error.message
    await engine.aclose()


async def test_auto_takes_shared_memory_on_one_host_and_tcp_beyond_and_says_so() -> None:
    engine = build_transfer(TransportConfig(), "here")
    near, far = segment("here", shm="1:2", tcp="127.0.0.1:1"), segment("there", shm="1:2", tcp="127.0.0.1:1")
    assert [transport_for(engine, one) for one in (near, far)] == ["shm", "tcp"]
    assert engine.choices() == {near.id: "shm", far.id: "tcp"}
    assert not engine.reaches(segment("elsewhere", ucx="?"))
    await engine.aclose()


async def test_one_batch_over_two_transports_keeps_its_order() -> None:
    memories = {"n.a": memoryview(bytearray(64)), "n.b": memoryview(bytearray(64))}

    class Other(InprocTransfer):
        kind = "other"

    engine = TransferSelector("auto", [InprocTransfer({"n.a": memories["n.a"]}), Other({"n.b": memories["n.b"]})])
    a, b = segment("a", inproc="x"), segment("b", tcp="x")
    b = Segment(id="n.b", node_id="n", size_bytes=64, host_id="b", addresses={"other": "x"})
    ops = [TransferOp(s, at, [memoryview(b"%d" % at)]) for at, s in enumerate([a, b, segment("c"), b, a])]
    results = await engine.write(ops, 5)
    assert [error is None for error in results] == [True, True, False, True, True]
    assert bytes(memories["n.a"][:5]) == b"0\0\0\0004"
    assert bytes(memories["n.b"][:5]) == b"\x001\x003\0"
    await engine.aclose()


async def test_hosts_follow_the_configuration_and_a_wildcard_needs_a_name() -> None:
    with SegmentMemory.create("n.1", 4096) as memory:
        hosts = await start_segment_hosts(TransportConfig(kind="shm"), memory, host="127.0.0.1")
        assert set(hosts.addresses) == {"shm"}
        await hosts.aclose()
        with pytest.raises(ConfigError, match="cannot be announced"):
            await start_segment_hosts(TransportConfig(), memory, host="0.0.0.0")
        hosts = await start_segment_hosts(TransportConfig(), memory, host="0.0.0.0", advertise_host="127.0.0.1")
        port = int(hosts.addresses["tcp"].removeprefix("127.0.0.1:"))
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*in use"):
            await start_segment_hosts(TransportConfig(), memory, host="127.0.0.1", port=port)
        await hosts.aclose()


async def test_inproc_faults_tear_a_write_and_delay_ends_at_the_deadline() -> None:
    memory = memoryview(bytearray(64))
    here = Segment(id="n.1", node_id="n", size_bytes=64, host_id="h", addresses={"inproc": "x"})

    async def tear(direction: str, op: TransferOp) -> InprocFault | None:
        return InprocFault(PeerUnreachableError("torn"), copied_bytes=3) if op.offset == 0 else None

    torn, whole = await InprocTransfer({"n.1": memory}, tear).write(
        [TransferOp(here, 0, [memoryview(b"ab"), memoryview(b"cd")]), TransferOp(here, 8, [memoryview(b"ok")])], 5
    )
    assert isinstance(torn, PeerUnreachableError) and whole is None
    assert bytes(memory[:10]) == b"abc\0\0\0\0\0ok"

    async def stall(direction: str, op: TransferOp) -> InprocFault | None:
        raise TimeoutError

    (late,) = await InprocTransfer({"n.1": memory}, stall).write([TransferOp(here, 0, [memoryview(b"x")])], 5)
    assert isinstance(late, TransferTimeoutError)


@given(
    ops=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), min_size=1, max_size=6),
    max_stripes=st.integers(1, 5),
    min_bytes=st.integers(1, 50),
)
def test_stripes_cover_every_byte_once_in_order(ops: list[list[int]], max_stripes: int, min_bytes: int) -> None:
    batch = [
        (i, TransferOp(segment(), 1000 * i, [memoryview(bytes([i]) * size) for size in sizes]))
        for i, sizes in enumerate(ops)
    ]
    stripes = stripe(batch, max_stripes, min_bytes)
    assert len(stripes) <= max_stripes
    at = {i: 1000 * i for i, _ in batch}
    for part in (part for parts in stripes for part in parts):
        assert part.offset == at[part.op_index]
        assert sum(view.nbytes for view in part.views) == part.num_bytes > 0
        assert all(bytes(view) == bytes([part.op_index]) * view.nbytes for view in part.views)
        at[part.op_index] += part.num_bytes
    assert at == {i: 1000 * i + op.num_bytes for i, op in batch}
