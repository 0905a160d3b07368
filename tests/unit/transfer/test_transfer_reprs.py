"""What people meet in a debugger says in one line what it is and holds."""

from support.transfer_rigs import Rig

from transfer.inproc import InprocTransfer
from transfer.memory.segment import SegmentMemory
from transfer.shm import ShmTransfer
from transfer.tcp.host import TcpSegmentHost
from transfer.tcp.transport import TcpTransfer


async def test_a_tcp_host_and_its_initiator() -> None:
    async with Rig("tcp") as rig:
        assert await rig.engine.write([rig.op(0, b"x")], 5) == [None]
        assert (
            repr(rig.engine) == "<TransferSelector tcp choices=1 engines=[<TcpTransfer open peers=1 idle=1 users=0>]>"
        )
        hosts = repr(rig._hosts)
        assert hosts.startswith("<SegmentHosts rig.1 [<TcpSegmentHost rig.1 127.0.0.1:")
        assert hosts.endswith(" serving connections=1/256>]>")
        (peer,) = rig.engine._engines[0]._peers.values()  # type: ignore[attr-defined]
        assert repr(peer) == "<_Peer idle=1 users=0>"
        assert repr(peer.idle[0]) == f"<Connection fd={peer.idle[0].sock.fileno()} greeted=True by=thread idle>"


async def test_those_that_were_not_started_or_were_closed() -> None:
    with SegmentMemory.create("n.1", 4096) as memory:
        host = TcpSegmentHost("n.1", memory.view, "127.0.0.1")
        assert repr(host) == "<TcpSegmentHost n.1 127.0.0.1:0 not started connections=0/256>"
    for engine, closed in (
        (ShmTransfer("h"), "<ShmTransfer closed host=h mapped=0>"),
        (InprocTransfer({}), "<InprocTransfer closed segments=0>"),
        (TcpTransfer(), "<TcpTransfer closed peers=0 idle=0 users=0>"),
    ):
        assert repr(engine) == closed.replace("closed", "open")
        await engine.aclose()
        assert repr(engine) == closed
