"""Mooncake's metadata over records: what an owner keeps, who gets a name, and whose records are removed."""

import asyncio

import msgspec
import pytest
from support.mooncake_dialect import AT_ONCE, HOST, NAME, RAM, RPC, dialect_rig, make_rig, ram, rpc

from kvcore.config.mooncake_metadata import LivenessKind, MooncakeMetadataConfig
from kvcore.errors import InvalidRequestError, OverloadedError, PayloadTooLargeError, RecordsUnavailableError
from metadata_server.mooncake.keys import Address
from metadata_server.mooncake.limits import DialectLimits
from metadata_server.mooncake.owners import ProbeOutcome
from metadata_server.mooncake.store import DialectStore

TTL = MooncakeMetadataConfig(liveness=LivenessKind.TTL, ttl_s=60.0)


@pytest.fixture
async def rig():
    async with dialect_rig() as rig:
        yield rig


class Gate:
    """A journal that can be held."""

    def __init__(self):
        self.open, self.waits = asyncio.Event(), asyncio.Event()
        self.open.set()

    async def write(self, batch):
        self.waits.set()
        await self.open.wait()
        self.waits.clear()

    async def aclose(self):
        pass


async def registered(rig, port=16426, data_port=16267):
    """A client that listens and has been asked once."""
    rig.ports.open(port)
    rig.ports.open(data_port)
    assert await rig.dialect.put(RPC, rpc(port)) is None
    assert await rig.dialect.put(RAM, ram(data_port)) is None
    await rig.look(1.0)


def killed(rig):
    rig.ports.say.clear()


async def test_a_clients_life(rig):
    assert await rig.dialect.put(RPC, rpc()) is None
    assert await rig.dialect.get(RAM) is None
    for length in (0, 1, 2):
        assert await rig.dialect.put(RAM, ram(length=length)) is None
    assert await rig.dialect.get(RAM) == ram(length=2) and await rig.dialect.get(RPC) == rpc()
    assert rig.dialect.num_keys == 2
    assert await rig.dialect.delete(RPC) and await rig.dialect.delete(RAM)
    assert not await rig.dialect.delete(RPC) and await rig.dialect.get(RPC) is None
    assert rig.dialect.num_keys == 0 and await rig.keys() == set()


async def test_the_same_value_again_writes_nothing(rig):
    await registered(rig)
    before = (await rig.records.listing("")).revision
    assert await rig.dialect.put(RPC, rpc()) is None and await rig.dialect.put(RAM, ram()) is None
    assert (await rig.records.listing("")).revision == before


async def test_a_live_clients_name_is_given_to_no_other(rig):
    await registered(rig)
    held = await rig.dialect.put(RPC, rpc(15001))
    assert held is not None and held.why == f"a live client at {HOST}:16426 has this name"
    assert await rig.dialect.get(RPC) == rpc()


async def test_a_restart_on_the_same_name_replaces_the_dead_and_what_it_lent(rig):
    await registered(rig)
    killed(rig)
    await rig.look(20.0)  # one miss: too few to remove anything
    assert await rig.keys() == {RPC, RAM}
    rig.ports.open(15001)
    assert await rig.dialect.put(RPC, rpc(15001)) is None
    assert await rig.dialect.get(RPC) == rpc(15001)
    assert await rig.dialect.get(RAM) is None, "no memory of the dead"
    assert await rig.dialect.put(RAM, ram(15002)) is None and rig.dialect.num_keys == 2


async def test_a_client_that_does_not_listen_yet_keeps_its_name_and_one_killed_then_loses_it():
    async with dialect_rig(limits=DialectLimits(again_s=0.0)) as rig:
        rig.ports.takes_s = 0.5
        await rig.dialect.put(RPC, rpc())
        asked = []
        original = rig.ports.probe

        async def opens_meanwhile(address, timeout_s):
            asked.append(address)
            if len(asked) == 2:
                rig.ports.open(16426)
            return await original(address, timeout_s)

        rig.liveness._probe = opens_meanwhile
        assert await rig.dialect.put(RPC, rpc(15001)) is not None
        killed(rig)
        began = rig.clock.now()
        assert await rig.dialect.put(RPC, rpc(15001)) is None
        assert 1.5 <= rig.clock.now() - began < 3.0, "within a client's own time limit"


async def test_a_port_that_never_answered_may_be_behind_a_firewall(rig):
    await rig.dialect.put(RPC, rpc())  # it lives, and all our probes are refused on the way
    await rig.dialect.put(RAM, ram())
    for _ in range(50):
        await rig.look(10.0)
    assert await rig.keys() == {RPC, RAM}
    held = await rig.dialect.put(RPC, rpc(15001))
    assert held is not None and "never answered" in held.why


async def test_records_of_the_dead_are_removed_after_misses_and_of_nobody_else(rig):
    await registered(rig)
    await rig.dialect.put("mooncake/x/rpc_meta/other:1", rpc(15500))
    await rig.dialect.put("mooncake/nvmeof/disk", b"{}")
    rig.ports.open(15500)
    await rig.look(1.0)
    killed(rig)
    rig.ports.open(15500)
    for _ in range(2):
        await rig.look(5.0)
        assert {RPC, RAM} <= await rig.keys()
    await rig.look(5.0)
    assert await rig.keys() == {"mooncake/x/rpc_meta/other:1", "mooncake/nvmeof/disk"}
    assert rig.dialect.num_keys == 2


async def test_one_answer_between_misses_is_enough(rig):
    await registered(rig)
    for turn in range(12):
        killed(rig)
        if turn % 3 == 2:
            rig.ports.open(16426)
        await rig.look(5.0)
    assert await rig.keys() == {RPC, RAM}


async def test_a_client_that_is_back_on_its_very_port_begins_anew(rig):
    await registered(rig)
    killed(rig)
    await rig.look(5.0)
    await rig.look(5.0)
    assert await rig.dialect.put(RPC, rpc()) is None  # its port opens in a moment
    await rig.look(1.0)
    assert RPC in await rig.keys()


async def test_memory_that_was_lent_before_the_registration_is_an_earlier_lifes(rig):
    await rig.dialect.put(RAM, ram(16267))
    await rig.dialect.put(RPC, rpc())
    rig.ports.open(16267)  # another process has that port now
    assert await rig.dialect.put(RAM, ram(15999)) is None


async def test_a_silent_clients_name_may_be_taken_but_its_records_stay_long(rig):
    await registered(rig)
    await rig.dialect.put("mooncake/rpc_meta/near:1", rpc(15500, "10.99.0.2"))
    rig.ports.open(15500, "10.99.0.2")
    rig.ports.say[Address(HOST, 16426)] = ProbeOutcome.SILENT
    held = await rig.dialect.put(RPC, rpc(15001))
    assert held is not None and "silent" in held.why
    for _ in range(100):
        await rig.look(5.0)
    assert await rig.keys() == {RPC, RAM, "mooncake/rpc_meta/near:1"}
    assert await rig.dialect.put(RPC, rpc(15001, "10.99.0.3")) is None
    assert await rig.dialect.get(RPC) == rpc(15001, "10.99.0.3") and await rig.dialect.get(RAM) is None


@pytest.mark.parametrize("we_are_cut_off", [True, False])
async def test_long_silence_is_death_unless_nobody_is_heard(rig, we_are_cut_off):
    await registered(rig)
    await rig.dialect.put("mooncake/rpc_meta/near:1", rpc(15500, "10.99.0.2"))
    rig.ports.open(15500, "10.99.0.2")
    await rig.look(5.0)
    rig.ports.say[Address(HOST, 16426)] = ProbeOutcome.SILENT
    if we_are_cut_off:
        rig.ports.say[Address("10.99.0.2", 15500)] = ProbeOutcome.SILENT
    for _ in range(150):
        await rig.look(5.0)
    assert (RPC in await rig.keys()) == we_are_cut_off
    assert "mooncake/rpc_meta/near:1" in await rig.keys()


async def test_what_cannot_be_asked_is_not_dead(rig):
    await registered(rig)
    rig.ports.say[Address(HOST, 16426)] = ProbeOutcome.UNKNOWN
    for _ in range(200):
        await rig.look(5.0)
    assert await rig.keys() == {RPC, RAM}
    assert await rig.dialect.put(RPC, rpc(15001)) is not None


async def test_a_port_belongs_to_whoever_registered_it_last(rig):
    await registered(rig)
    other = "mooncake/rpc_meta/other:1"
    assert await rig.dialect.put(other, rpc(16426)) is None, "the first one was killed and this one got its port"
    assert await rig.dialect.put(RPC, rpc(15001)) is None, "and comes back on another"
    rig.ports.open(15001)
    for _ in range(5):
        await rig.look(5.0)
    assert await rig.keys() == {RPC, other}


async def test_a_dead_owner_whose_port_went_to_another_is_removed(rig):
    await registered(rig)
    other = "mooncake/rpc_meta/other:1"
    await rig.dialect.put(other, rpc(16426))
    for _ in range(3):
        await rig.look(5.0)
    assert await rig.keys() == {other}


async def test_memory_of_a_closed_client_goes_when_its_data_port_is_closed(rig):
    await registered(rig)
    await rig.dialect.delete(RPC)  # and was killed before it could delete the other
    await rig.dialect.restore()
    await rig.look(1.0)
    assert await rig.keys() == {RAM}
    killed(rig)
    for _ in range(3):
        await rig.look(5.0)
    assert await rig.keys() == set()


async def test_two_live_clients_do_not_share_memory_under_one_name(rig):
    await registered(rig)
    held = await rig.dialect.put(RAM, ram(15999))
    assert held is not None and "lends its memory" in held.why and await rig.dialect.get(RAM) == ram()
    rig.ports.close(16267)
    assert await rig.dialect.put(RAM, ram(15999)) is None


async def test_what_an_earlier_life_knew_is_known_after_a_restart(rig):
    await registered(rig)
    again = await make_rig(rig.records, rig.clock, rig.ports, rig.config, rig.limits)
    assert again.dialect.num_keys == 2 and await again.dialect.get(RPC) == rpc()
    killed(rig)
    await again.look(60.0)
    assert await again.keys() == {RPC, RAM}, "one miss"
    for _ in range(2):
        await again.look(5.0)
    assert await again.keys() == set(), "it had answered our earlier life"
    await again.dialect.restore()
    assert (await rig.records.listing("")).records == (), "nor is that kept any longer"


@pytest.mark.parametrize("removal_is_staged", [True, False])
async def test_a_registration_in_the_midst_of_its_removal_stays(removal_is_staged):
    gate = Gate()
    async with dialect_rig(journal=gate) as rig:
        await registered(rig)
        killed(rig)
        await rig.look(5.0)
        await rig.look(5.0)
        began, go_on, delete = asyncio.Event(), asyncio.Event(), rig.records.delete

        async def late(key, *, expect=None):
            began.set()
            await go_on.wait()
            return await delete(key, expect=expect)

        if removal_is_staged:
            gate.open.clear()
        else:
            rig.records.delete = late
        looking = asyncio.create_task(rig.look(5.0))
        await (gate.waits.wait() if removal_is_staged else began.wait())
        rig.ports.open(16426)
        putting = asyncio.create_task(rig.dialect.put(RPC, rpc()))  # restarted, on its very port
        if removal_is_staged:
            await asyncio.sleep(0)
            gate.open.set()
        else:
            await putting
            go_on.set()
        await looking
        assert await putting is None
        await rig.look(1.0)
        assert await rig.dialect.get(RPC) == rpc()


async def test_writers_of_one_new_name_get_it_once(rig):
    rig.ports.open(15000)
    for port in range(15001, 15009):
        rig.ports.open(port)
    answers = await asyncio.gather(*(rig.dialect.put(RPC, rpc(port)) for port in range(15000, 15009)))
    assert [held is None for held in answers].count(True) == 1
    winner = answers.index(None)
    assert await rig.dialect.get(RPC) == rpc(15000 + winner)


async def test_bounds():
    config = MooncakeMetadataConfig(max_keys=2, max_value=1000)
    async with dialect_rig(config) as rig:
        with pytest.raises(PayloadTooLargeError):
            await rig.dialect.put("k", b"x" * 1001)
        for key in ("k" * 385, "k\n", "k\x00"):
            with pytest.raises(InvalidRequestError):
                await rig.dialect.put(key, b"")
        await rig.dialect.put("ü" * 192, b"x" * 1000)
        await rig.dialect.put("b", b"")
        with pytest.raises(OverloadedError, match="2 metadata keys"):
            await rig.dialect.put("c", b"")
        await rig.dialect.put("b", b"again")
        assert await rig.dialect.delete("b") and await rig.dialect.put("c", b"") is None


async def test_a_registration_that_nobody_can_read_is_held_as_mooncake_holds_it(rig):
    assert await rig.dialect.put("mooncake/rpc_meta/odd", b"no json") is None
    held = await rig.dialect.put("mooncake/rpc_meta/odd", b"other")
    assert held is not None and "does not say" in held.why


async def test_records_that_cannot_be_written_are_no_ones_death(rig):
    await registered(rig)
    killed(rig)
    delete = rig.records.delete

    async def refuse(key, *, expect=None):
        raise RecordsUnavailableError("the disk is full")

    rig.records.delete = refuse
    for _ in range(5):
        await rig.look(5.0)
    await rig.records.put("metadata-answered/mooncake/rpc_meta/gone:1", b"1")
    again = await make_rig(rig.records, rig.clock, rig.ports, rig.config, rig.limits)
    assert await again.dialect.get(RPC) == rpc(), "what cannot be tidied hinders no start"
    with pytest.raises(RecordsUnavailableError):
        await rig.dialect.delete(RPC)
    rig.records.delete = delete
    await rig.look(5.0)
    assert await rig.keys() == set()


async def test_by_time_an_owner_stays_as_long_as_it_writes():
    async with dialect_rig(TTL) as rig:
        await rig.dialect.put(RPC, rpc())
        await rig.dialect.put(RAM, ram())
        await rig.dialect.put("mooncake/nvmeof/disk", b"{}")
        for _ in range(5):
            await rig.look(40.0)
            await rig.dialect.put(RPC, rpc())  # the same again renews both
        assert await rig.keys() == {RPC, RAM}
        held = await rig.dialect.put(RPC, rpc(15001))
        assert held is not None and "stays for another 60 s" in held.why
        assert await rig.dialect.put(RAM, ram(15002)) is not None
        again = await make_rig(rig.records, rig.clock, rig.ports, rig.config, AT_ONCE)
        await again.look(59.0)
        assert await again.keys() == {RPC, RAM}, "a restart begins the time anew"
        await again.look(2.0)
        assert await again.keys() == set() and again.dialect.num_keys == 0
        assert rig.ports.asked == []


async def test_by_time_a_name_is_free_when_its_time_is_over():
    async with dialect_rig(TTL) as rig:
        await rig.dialect.put(RPC, rpc())
        rig.clock.advance(61.0)
        assert await rig.dialect.put(RPC, rpc(15001)) is None


async def test_the_listing_finds_what_another_server_wrote(rig):
    other = DialectStore(rig.records)
    await other.put(RPC, rpc(), None)
    rig.ports.open(16426)
    await rig.dialect.restore()
    assert rig.dialect.num_keys == 1
    await rig.look(1.0)
    assert rig.ports.asked == [Address(HOST, 16426)]
    assert msgspec.json.decode(await rig.dialect.get(RPC))["rpc_port"] == 16426
    assert NAME in repr(rig.dialect) or "1 owners" in repr(rig.dialect)
