"""What the gate of documents has turned is kept: a router that is started anew reuses nothing that was turned off."""

import asyncio
from functools import partial

from support.metadata_rigs import DirectTransport, until
from support.metadata_words import new_state

from kvcore.clock import ManualClock
from kvcore.config.kv.settings import BlendConfig
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.versions import Protocols
from router.shadow.gate import BlendGate
from router.shadow.keeping import UNHEARD, KeptSwitches
from router.shadow.limits import BlendGateLimits, ShadowLimits
from router.shadow.wiring import follow

BAD = (2.0, 0.5)


class Router:
    """The gate of one, and what keeps it. `away`: the metadata server is."""

    def __init__(self, core: MetadataCore, *, away: bool = False) -> None:
        self.transport = DirectTransport(core)
        self.core = core
        if away:
            self.transport.core = None
        # It is asked again at once: a server that was away is left alone for a while by the clock alone.
        self.clock = ManualClock()
        self.client = MetadataClient(self.transport, self.clock, 5.0)
        config = BlendConfig(mode="first_k")
        self.gate = BlendGate(config, lambda: 1000.0, BlendGateLimits(judged_from=1))
        limits = ShadowLimits(keep_again_s=1e-3)
        self.kept = KeptSwitches(self.gate, self.client, partial(follow, self.gate), limits)

    @property
    def off(self) -> str:
        return self.gate.why_off("m", "field")


async def test_a_lone_router_that_is_started_anew_does_not_turn_documents_on_again():
    core = MetadataCore(new_state(), ManualClock())
    first = Router(core)
    await first.kept.exchange()
    assert first.off == ""
    first.gate.compared("m", "field", *BAD)
    await first.kept.exchange()
    again = Router(core)
    assert again.off == UNHEARD, "before it has heard it reuses nothing"
    await again.kept.exchange()
    assert again.off == first.off and again.off.startswith("turned off, until `kvferry blend on`: ")
    assert again.gate.turn_on(["field"]) == ["field of m"], "a person may, by its name"
    await again.kept.exchange()
    third = Router(core)
    await third.kept.exchange()
    assert third.off == ""


async def test_a_change_is_told_at_once_and_heard_by_the_others():
    core = MetadataCore(new_state(), ManualClock())
    one, other = Router(core), Router(core)
    one.kept._limits = ShadowLimits(keep_again_s=3600.0)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(router.kept.run()) for router in (one, other)]
        await until(lambda: not one.gate.unheard and not other.gate.unheard)
        one.gate.compared("m", "field", *BAD)
        await until(lambda: other.off == one.off != "")
        for task in running:
            task.cancel()


async def test_while_the_metadata_server_is_away_nothing_is_reused_that_may_have_been_turned_off():
    core = MetadataCore(new_state(), ManualClock())
    router = Router(core, away=True)
    await router.kept.exchange()
    assert router.off == UNHEARD and "was not heard" in str(router.gate.problem())
    router.transport.core = core
    router.clock.advance(60.0)
    await router.kept.exchange()
    assert router.off == "" and router.gate.problem() is None
    router.transport.core = None
    await router.kept.exchange()
    assert router.off == "", "what was last heard holds"


async def test_a_metadata_server_that_is_older_keeps_nothing_and_documents_are_reused():
    core = MetadataCore(new_state(), ManualClock())
    core.state.speaks = Protocols(1, 6)

    async def refused(*_: object, **__: object) -> None:
        raise MetadataProtocolError("no such endpoint")

    router = Router(core)
    router.client.blend_switches = refused  # type: ignore[method-assign,assignment]
    await router.kept.exchange()
    assert router.off == ""


async def test_a_failed_call_is_no_answer():
    core = MetadataCore(new_state(), ManualClock())

    async def failed(*_: object, **__: object) -> None:
        raise MetadataUnavailableError("records")

    router = Router(core)
    router.client.blend_switches = failed  # type: ignore[method-assign,assignment]
    await router.kept.exchange()
    assert router.off == UNHEARD
