"""Several Redis servers of a test's own that belong together: a master with a replica and sentinels, or a cluster."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from redis.crc import key_slot
from support.ports import free_ports
from support.redis_server import RedisServer, redis_server

SERVICE = "kv"
_WAIT_S = 30.0


def until(check: Callable[[], bool], what: str) -> None:
    """Polls: servers tell nobody."""
    end, pause = time.monotonic() + _WAIT_S, threading.Event()
    while not check():
        assert time.monotonic() < end, f"not within {_WAIT_S:g} s: {what}"
        pause.wait(0.02)


class SentinelGroup:
    """A master, a replica and three sentinels that promote it within about two seconds."""

    def __init__(self, master: RedisServer, replica: RedisServer, sentinels: list[RedisServer]) -> None:
        self.servers = [master, replica]
        self.sentinels = sentinels

    @property
    def url(self) -> str:
        return f"redis-sentinel://{','.join(f'127.0.0.1:{one.port}' for one in self.sentinels)}/{SERVICE}"

    @property
    def master(self) -> RedisServer:
        """As the sentinels say."""
        said = self.sentinels[0].ask(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", SERVICE.encode())
        assert isinstance(said, list)
        return next(server for server in self.servers if str(server.port).encode() == said[1])


@contextmanager
def sentinel_group(program: str = "redis-server") -> Iterator[SentinelGroup]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        at_once = ("--repl-diskless-sync-delay", "0")
        master = stack.enter_context(redis_server(*at_once, program=program))
        how = ("--replicaof", "127.0.0.1", str(master.port), *at_once)
        replica = stack.enter_context(redis_server(*how, program=program))
        until(partial(follows, replica), "the replica follows")
        sentinels = []
        for number in range(3):
            file = folder / f"sentinel-{number}.conf"
            lines = [
                f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} 2",
                f"sentinel down-after-milliseconds {SERVICE} 300",
                f"sentinel failover-timeout {SERVICE} 1000",
            ]
            file.write_text("\n".join(lines) + "\n")
            sentinels.append(stack.enter_context(redis_server(program=program, sentinel=file)))
        for sentinel in sentinels:
            until(partial(_knows_all, sentinel), "the sentinels know one another and the replica")
        yield SentinelGroup(master, replica, sentinels)


def _knows_all(sentinel: RedisServer) -> bool:
    said = sentinel.ask(b"SENTINEL", b"MASTER", SERVICE.encode())
    assert isinstance(said, list)
    facts = dict(zip(said[::2], said[1::2], strict=True))
    return facts[b"num-slaves"] == b"1" and facts[b"num-other-sentinels"] == b"2"


class ClusterGroup:
    """Masters of a Redis Cluster, each with a third of the slots."""

    def __init__(self, servers: list[RedisServer], slots: list[range]) -> None:
        self.servers, self.slots = servers, slots

    @property
    def url(self) -> str:
        return f"redis-cluster://{','.join(f'127.0.0.1:{one.port}' for one in self.servers)}"

    def settle(self) -> None:
        """All run, and know one another."""
        for server in self.servers:
            if not server.running:
                server.start()
        for server in self.servers:
            until(partial(_knows_nodes, server, len(self.servers)), "the nodes know one another")

    def id_of(self, number: int) -> bytes:
        said = self.servers[number].ask(b"CLUSTER", b"MYID")
        assert isinstance(said, bytes)
        return said

    def server_of(self, key: bytes) -> RedisServer:
        """Whose slot the key is in, as they were given out."""
        return self.servers[next(number for number, slots in enumerate(self.slots) if key_slot(key) in slots)]


@contextmanager
def cluster_group(program: str = "redis-server", *, replicas: int = 0) -> Iterator[ClusterGroup]:
    """Three masters; `replicas` more servers follow the first."""
    with ExitStack() as stack:
        how = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no"]
        how += ["--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"]
        buses = free_ports(3 + replicas)
        ports = (("--cluster-port", str(bus)) for bus in buses)
        servers = [stack.enter_context(redis_server(*how, *port, program=program)) for port in ports]
        bounds = [0, 5461, 10922, 16384]
        slots = [range(bounds[number], bounds[number + 1]) for number in range(3)]
        first, *others = servers
        for number, server in enumerate(servers[:3]):
            for start in range(slots[number].start, slots[number].stop, 1000):
                some = range(start, min(start + 1000, slots[number].stop))
                assert server.ask(b"CLUSTER", b"ADDSLOTS", *(b"%d" % slot for slot in some)) == b"OK"
            assert server.ask(b"CLUSTER", b"SET-CONFIG-EPOCH", b"%d" % (number + 1)) == b"OK"
        for other, bus in zip(others, buses[1:], strict=True):
            assert first.ask(b"CLUSTER", b"MEET", b"127.0.0.1", b"%d" % other.port, b"%d" % bus) == b"OK"
        group = ClusterGroup(servers, slots)
        group.settle()
        for replica in servers[3:]:
            assert replica.ask(b"CLUSTER", b"REPLICATE", group.id_of(0)) == b"OK"
            until(partial(follows, replica), "the replica follows")
        yield group


def _knows_nodes(server: RedisServer, number: int) -> bool:
    said = server.ask(b"CLUSTER", b"INFO")
    assert isinstance(said, bytes)
    return b"cluster_state:ok" in said and b"cluster_known_nodes:%d\r" % number in said


def follows(replica: RedisServer) -> bool:
    return b"master_link_status:up" in info(replica, b"replication")


def info(server: RedisServer, section: bytes) -> bytes:
    said = server.ask(b"INFO", section)
    assert isinstance(said, bytes)
    return said
