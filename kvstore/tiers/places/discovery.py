"""Where a Redis is now, asked by redis-py: the master that sentinels know of, and which master of a cluster has a slot.

Owns what was found last; asks again when it is told that something is wrong with that. Moves no chunk.
"""

import asyncio
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

from kvcore.clock import Clock
from kvcore.errors import ConfigError
from kvstore.tiers.places.redis_url import RedisPlaces, RespServer, at


class ServerPlace(Protocol):
    """One server, whichever it is at the time."""

    @property
    def shown(self) -> str:
        """For people: without user and password."""
        ...

    async def find(self, timeout_s: float) -> RespServer:
        """Where it is: as known, or asked for. Raises OSError or TimeoutError."""
        ...

    def forget(self) -> None:
        """What is known may be wrong: ask again."""
        ...


class SentinelMaster:
    """The master of a service, as its sentinels say. See `ServerPlace`."""

    def __init__(self, places: RedisPlaces) -> None:
        """Raises ConfigError where redis-py is missing."""
        self.shown = places.shown
        self._places, self._redis = places, _redis_py("sentinel")
        self._found: RespServer | None = None
        self._asking = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<SentinelMaster {self.shown}: {self._found.place if self._found else 'not known'}>"

    async def find(self, timeout_s: float) -> RespServer:
        """See `ServerPlace`."""
        async with asyncio.timeout(timeout_s), self._asking:
            if self._found is None:
                self._found = await self._ask(timeout_s)
            return self._found

    def forget(self) -> None:
        """See `ServerPlace`."""
        self._found = None

    async def _ask(self, timeout_s: float) -> RespServer:
        servers, first = self._places.servers, self._places.servers[0]
        options = _options(timeout_s / len(servers), first.encrypted)
        if self._places.sentinel_password:
            options["password"] = self._places.sentinel_password
        hosts = [(server.host, server.port) for server in servers]
        sentinel = self._redis.asyncio.Sentinel(hosts, sentinel_kwargs=options)
        try:
            host, port = await sentinel.discover_master(self._places.service)
        except (self._redis.RedisError, OSError) as error:
            raise OSError(f"no sentinel knows a master of {self._places.service} ({_short(error)})") from None
        finally:
            await sentinel.aclose()
        return at(first, host, int(port))


class ClusterSlots:
    """Which master of a Redis Cluster has which slot."""

    def __init__(self, places: RedisPlaces, clock: Clock, *, rediscover_s: float) -> None:
        """At most once in `rediscover_s` it asks again. Raises ConfigError where redis-py is missing."""
        self.shown = places.shown
        self._clock, self._rediscover_s = clock, rediscover_s
        self._asked_at = -rediscover_s
        self._servers, self._redis = list(places.servers), _redis_py("cluster")
        self._slots: dict[int, RespServer] = {}
        self._known = False
        self._failed = set[RespServer]()
        """That did not answer when they were asked last: they are asked after the others."""
        self._asking = asyncio.Lock()
        self._key_slot: Callable[[bytes], int] = self._redis.crc.key_slot

    def __repr__(self) -> str:
        return f"<ClusterSlots {self.shown}: {len(set(self._slots.values()))} masters>"

    def slot(self, key: bytes) -> int:
        """Of a key, by its hash tag."""
        return self._key_slot(key)

    def master(self, slot: int) -> RespServer | None:
        """The one that has this slot, as far as is known; None: nobody has."""
        return self._slots.get(slot)

    def masters(self) -> list[RespServer]:
        """All that have any."""
        return list(dict.fromkeys(self._slots.values()))

    def moved(self, slot: int, server: RespServer) -> None:
        """A node says that `server` has this slot. Much else may have moved."""
        self._slots[slot] = server
        self._known = False

    def forget(self) -> None:
        """What is known may be wrong: ask again."""
        self._known = False

    async def refresh(self, timeout_s: float) -> None:
        """Ask, if something was wrong with what is known. Raises OSError or TimeoutError: then all stays as it was."""
        async with asyncio.timeout(timeout_s), self._asking:
            if self._known or (self._slots and self._clock.now() < self._asked_at + self._rediscover_s):
                return
            self._asked_at = self._clock.now()
            asked = sorted(dict.fromkeys([*self.masters(), *self._servers]), key=self._failed.__contains__)
            problem: Exception | None = None
            for server in asked:
                try:
                    self._slots = await self._ask(server, timeout_s / len(asked))
                    self._known = True
                    self._failed.discard(server)
                    return
                except (self._redis.RedisError, OSError, ValueError, TypeError, LookupError) as error:
                    problem = error
                    self._failed.add(server)
            raise OSError(f"none of its nodes says who has which slot ({_short(problem)})")

    async def _ask(self, server: RespServer, timeout_s: float) -> dict[int, RespServer]:
        who = {"username": server.user or None, "password": server.password or None}
        options = _options(timeout_s, server.encrypted)
        client = self._redis.asyncio.Redis(host=server.host, port=server.port, **who, **options)
        try:
            ranges = await client.execute_command("CLUSTER SLOTS")
        finally:
            await client.aclose()
        slots = {}
        for low, high, master, *_ in ranges:
            host = master[0].decode() if isinstance(master[0], bytes) else str(master[0] or "")
            owner = at(server, host or server.host, int(master[1]))  # an empty host is that of who answers
            slots.update(dict.fromkeys(range(int(low), int(high) + 1), owner))
        return slots


def _options(timeout_s: float, encrypted: bool) -> dict[str, Any]:
    """Of a connection that asks one thing."""
    retry = _redis_py("").retry.Retry(_redis_py("").backoff.NoBackoff(), 0)
    waits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    return {**waits, "retry": retry, "ssl": encrypted}


def _redis_py(kind: str) -> ModuleType:
    try:
        import redis
        import redis.asyncio
        import redis.backoff
        import redis.crc
        import redis.retry
    except ImportError:
        raise ConfigError(
            f"tiers.redis.url: Redis {kind.capitalize()} is found by redis-py: pip install 'kvferry[redis]'"
        ) from None
    return redis


def _short(error: Exception | None) -> str:
    return str(error).partition("\n")[0][:200]
