"""Follows the KV events of plain vLLM servers over ZeroMQ, each server's by a task of its own.

Wire (vllm/distributed/kv_events.py): a PUB socket sends (topic, u64be sequence, msgpack [ts, [events], rank]); a ROUTER
socket answers (empty, u64be first) with what it keeps from there on, and ends with the sequence -1.
"""

import asyncio
import logging
from contextlib import closing, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import msgspec

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.peer_log import PeerLog
from kvcore.telemetry import log_fields
from router.kv_events.wire import decode_events
from router.routing.told import CacheEvent, ToldPrefixes

_log = logging.getLogger("router")
_END = (-1).to_bytes(8, "big", signed=True)


@dataclass(frozen=True, slots=True)
class EventFeedLimits:
    """Seconds, bytes and counts."""

    replay_s: float = 5.0
    """For one batch of a replay."""
    again_s: float = 1.0
    """Between two tries to begin."""
    heartbeat_s: float = 2.0
    silent_s: float = 6.0
    """A publisher that answers no heartbeat for so long is taken for dead."""
    max_batch: int = 64 << 20
    most_waiting: int = 10_000
    """Batches that wait in the socket; what comes beyond is missed, and asked for again."""


class EventFeed:
    """One server's. `run` never ends; a server that is away, or tells nonsense, is one that does not tell."""

    def __init__(
        self,
        zmq: ModuleType,
        server: str,
        *,
        events: str,
        replay: str | None,
        told: ToldPrefixes,
        said: PeerLog,
        limits: EventFeedLimits = EventFeedLimits(),
    ) -> None:
        self._zmq, self._context = zmq, zmq.asyncio.Context.instance()
        self._server, self._events, self._replay_at = server, events, replay
        self._told, self._said, self._limits = told, said, limits
        self._last = -1
        """The number of the last batch that came over this connection."""
        self._lost = False
        """The last replay did not come to its end."""

    def __repr__(self) -> str:
        return f"<EventFeed of {self._server} at {self._events}>"

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._run()
            except self._zmq.ZMQError as error:  # an address that is none here, no descriptors
                self._say(f"its KV events cannot be followed: {error}")
            except Exception as error:  # boundary: what it says costs its server the events, never the router
                _log.exception("kv_events_failed")
                self._say(f"its KV events cannot be read: {error!r}")
                self._told.missed(self._server)
            self._told.heard(self._server, False)
            await asyncio.sleep(self._limits.again_s)

    async def _run(self) -> None:
        zmq, limits = self._zmq, self._limits
        with closing(self._socket(zmq.SUB)) as live:
            live.setsockopt(zmq.RCVHWM, limits.most_waiting)
            live.setsockopt(zmq.HEARTBEAT_IVL, int(limits.heartbeat_s * 1000))
            live.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(limits.silent_s * 1000))
            live.subscribe(b"")
            with closing(live.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)) as state:
                live.connect(self._events)
                await self._follow(live, state)

    async def _follow(self, live: Any, state: Any) -> None:
        zmq, poller, connected = self._zmq, self._zmq.asyncio.Poller(), False
        poller.register(live, zmq.POLLIN)
        poller.register(state, zmq.POLLIN)
        while True:
            if connected and self._told.next_seq(self._server) is None:  # also after `ToldPrefixes.forget`
                await self._replay(0)
            ready = dict(await poller.poll(self._limits.again_s * 1000))
            if state in ready:
                event = zmq.utils.monitor.parse_monitor_message(await state.recv_multipart())["event"]
                connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
                if connected and (first := self._told.next_seq(self._server)) is not None:
                    await self._resume(first)
                self._told.heard(self._server, connected)
                self._last = -1
            elif live in ready:  # of the connection that is known of
                await self._heard(await live.recv_multipart())
            await asyncio.sleep(0)  # what is ready at once would keep everybody else waiting

    async def _heard(self, frames: list[bytes]) -> None:
        """A batch as it was published. There are four cases:

        1. It is the next one.
        2. It was replayed already, while it waited in the socket: numbers only grow while a connection lasts.
        3. Its number was seen already, or none was: the server has started anew, or was running before us.
        4. Some before it were missed: they are asked for, and this one with them.
        """
        if (found := self._decoded(frames)) is None:
            self._told.missed(self._server)
            return
        seq, events = found
        grows, self._last = seq > self._last, seq
        expected = self._told.next_seq(self._server)
        if expected is not None and seq < expected and grows and self._replay_at is not None:
            return
        if expected is None or seq < expected:
            self._told.forget(self._server)
            if seq == 0:
                self._told.begin(self._server)
            else:
                await self._replay(0)
        elif seq > expected:
            await self._replay(expected)
        after = self._told.next_seq(self._server)
        if after is None and self._replay_at is not None and not self._lost:
            return  # forgotten meanwhile: `_follow` begins anew, with this one
        if after is None or after <= seq:
            self._told.apply(self._server, seq, events)

    async def _resume(self, first: int) -> None:
        """It can be heard again: what was missed is asked for, and the last one that was not, by which a server is told
        from one that has started anew."""
        if self._replay_at is None or first == 0:
            return
        if not await self._replay(first, knows=first - 1):
            self._told.forget(self._server)
            await self._replay(0)

    async def _replay(self, first: int, *, knows: int | None = None) -> bool:
        """Ask for all from `first` on and apply it. What the server keeps no more is missed for good; where it keeps
        nothing, nothing was told yet. Whether it keeps batch `knows` too."""
        if self._replay_at is None:
            return False
        with closing(self._socket(self._zmq.DEALER)) as asking:
            asking.connect(self._replay_at)
            await asking.send_multipart((b"", (first if knows is None else knows).to_bytes(8, "big")))
            known, begun, self._lost = False, first > 0, False
            with suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(self._limits.replay_s):
                        frames = await asking.recv_multipart()
                    if not begun:
                        begun = True
                        self._told.begin(self._server)
                    elif self._told.next_seq(self._server) is None:  # forgotten meanwhile: it begins anew
                        return known
                    if len(frames) == 4 and frames[2] == _END:
                        return known
                    if (found := self._decoded(frames[1:])) is None:
                        break
                    if found[0] == knows:
                        known = True
                    elif known or knows is None:
                        self._told.apply(self._server, *found)
                    await asyncio.sleep(0)
        self._lost = True
        self._told.missed(self._server)
        self._say("its KV events could not be replayed")
        return known

    def _socket(self, kind: int) -> Any:
        made = self._context.socket(kind)
        made.setsockopt(self._zmq.LINGER, 0)
        made.setsockopt(self._zmq.IPV6, 1)
        made.setsockopt(self._zmq.MAXMSGSIZE, self._limits.max_batch)
        return made

    def _decoded(self, frames: list[bytes]) -> tuple[int, list[CacheEvent]] | None:
        try:
            _, number, payload = frames
            return int.from_bytes(number, "big"), decode_events(payload)
        except (ValueError, msgspec.MsgspecError) as error:
            self._say(f"its KV events cannot be read: {error}")
            return None

    def _say(self, why: str) -> None:
        if self._said.allows("events", self._server) is not None:
            log_fields(_log, logging.WARNING, "kv_events", node=self._server, why=why[:200])


def event_feeds(config: ClusterConfig, told: ToldPrefixes | None, clock: Clock) -> list[EventFeed]:
    """Of the servers whose events the file names. ConfigError without pyzmq."""
    named = {name: node for name, node in config.nodes.items() if node.events is not None}
    if not named or told is None:
        return []
    try:
        import zmq.asyncio
        import zmq.utils.monitor
    except ImportError as error:
        name = next(iter(named))
        raise ConfigError(f"nodes.{name}.events needs pyzmq: pip install 'kvferry[events]'") from error
    said = PeerLog(_log, clock=clock)
    return [
        EventFeed(zmq, name, events=node.events, replay=node.events_replay, told=told, said=said)
        for name, node in named.items()
        if node.events is not None
    ]
