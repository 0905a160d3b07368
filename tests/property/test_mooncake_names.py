"""Mooncake's names under any sequence of starts, kills, cuts, pauses and restarts of ours.

Held: a client that lives and can be reached keeps its records, whoever else wants its name; what it reads is what was
answered last; the dead are gone in the end.
"""

import asyncio
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.metadata_rigs import end
from support.mooncake_dialect import AT_ONCE, Ports, make_rig

from kvcore.clock import ManualClock
from kvcore.config.mooncake_metadata import MooncakeMetadataConfig
from metadata_server.mooncake.keys import Address
from metadata_server.mooncake.owners import ProbeOutcome
from metadata_server.records.memory import memory_records

CONFIG = MooncakeMetadataConfig(every_s=5.0, misses=3, silent_s=60.0)
NAMES = st.sampled_from(["a:1", "b:1"])
HOSTS = st.sampled_from(["10.0.0.1", "10.0.0.2"])


@dataclass
class Client:
    """One process that was given its name."""

    name: str
    at: Address
    value: bytes
    firewalled: bool
    was_cut: bool = False
    seen: bool = False
    """Its port has answered us."""

    @property
    def rpc(self) -> str:
        return f"mooncake/rpc_meta/{self.name}"

    @property
    def ram(self) -> str:
        return f"mooncake/ram/{self.name}"


class Names(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.ports = Ports(self.clock)
        self.live: dict[str, Client] = {}
        self.left: dict[str, Client] = {}
        """By name, who was killed last and whose name nobody has had since."""
        self.next_port = 15000
        self.spare_ports: list[Address] = []

    def do(self, call):
        return self.runner.run(call)

    @initialize()
    def begin(self):
        async def begin():
            self.records = memory_records(self.clock)
            self.running = asyncio.ensure_future(self.records.run())

        self.do(begin())
        self.restart()

    @rule()
    def restart(self):
        """Our server, over the same records."""
        self.rig = self.do(make_rig(self.records, self.clock, self.ports, CONFIG, AT_ONCE))

    @rule(name=NAMES, host=HOSTS, firewalled=st.booleans(), reuses_a_port=st.booleans())
    def start(self, name, host, firewalled, reuses_a_port):
        at = Address(host, self.next_port)
        if reuses_a_port and self.spare_ports:
            at = self.spare_ports.pop()
        self.next_port += 1
        value = b'{"ip_or_host_name":"%s","rpc_port":%d}' % (at.host.encode(), at.port)
        client = Client(name, at, value, firewalled)
        held = self.do(self.rig.dialect.put(client.rpc, value))
        holder = self.live.get(name)
        if holder is not None and not holder.was_cut and not holder.firewalled:
            assert held is not None, "the name of a live client was given to another"
        if held is None:
            self.live[name] = client
            self.left.pop(name, None)
            if not firewalled:
                self.ports.say[at] = ProbeOutcome.ANSWERED
            assert self.do(self.rig.dialect.put(client.ram, self.memory(client, 0))) is None

    @staticmethod
    def memory(client, length):
        where = (client.name.encode(), client.at.host.encode(), client.at.port + 10_000, length)
        return b'{"name":"%s","tcp_data_host":"%s","tcp_data_port":%d,"buffers":[%d]}' % where

    @precondition(lambda self: self.live)
    @rule(data=st.data(), length=st.integers(0, 5))
    def lend(self, data, length):
        client = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        value = self.memory(client, length)
        assert self.do(self.rig.dialect.put(client.ram, value)) is None
        assert self.do(self.rig.dialect.get(client.ram)) == value

    @precondition(lambda self: self.live)
    @rule(data=st.data(), closes=st.booleans())
    def leave(self, data, closes):
        client = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.ports.say.pop(client.at, None)
        self.spare_ports.append(client.at)
        self.left[client.name] = client
        if closes:
            self.do(self.rig.dialect.delete(client.rpc))
            self.do(self.rig.dialect.delete(client.ram))
            assert self.do(self.rig.dialect.get(client.rpc)) is None

    @precondition(lambda self: self.live)
    @rule(data=st.data(), outcome=st.sampled_from([ProbeOutcome.SILENT, ProbeOutcome.UNKNOWN]))
    def cut(self, data, outcome):
        client = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        client.was_cut |= outcome is ProbeOutcome.SILENT
        self.ports.say[client.at] = outcome

    @rule()
    def mend(self):
        for client in self.live.values():
            if not client.firewalled:
                self.ports.say[client.at] = ProbeOutcome.ANSWERED

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 20.0]), turns=st.integers(1, 5))
    def time_passes(self, seconds, turns):
        for _ in range(turns):
            self.do(self.rig.look(seconds))
        for client in self.live.values():
            client.seen |= seconds >= 5.0 and self.ports.say.get(client.at) is ProbeOutcome.ANSWERED

    @rule()
    def list_again(self):
        self.do(self.rig.dialect.restore())

    @invariant()
    def live_clients_keep_their_records(self):
        if not self.live:
            return
        keys = self.do(self.rig.keys())
        for client in self.live.values():
            if not client.was_cut and not client.firewalled:
                assert {client.rpc, client.ram} <= keys
                assert self.do(self.rig.dialect.get(client.rpc)) == client.value

    @invariant()
    def the_count_is_right(self):
        assert self.rig.dialect.num_keys == len(self.do(self.rig.keys()))

    def teardown(self):
        self.mend()
        for _ in range(8):
            self.do(self.rig.look(5.0))
        keys = self.do(self.rig.keys())
        for client in self.left.values():
            assert not client.seen or not {client.rpc, client.ram} & keys, "the dead are gone in the end"
        self.do(end(self.running))
        self.runner.close()


TestNames = Names.TestCase
TestNames.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
