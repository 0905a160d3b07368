"""Several routers over the same nodes in virtual time, which tell each other of their load unless they are cut off."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec
from support.sim_load import Flow, Load, Machine, QueueNode, QueueNodes, Seen
from support.sim_loop import LoopClock

from nodeapi.messages import EngineStats, GenerateRequest, NodeReport, TokenDelta
from router.admission.limits import AdmissionLimits
from router.admission.sharing import AdmissionReport, SharedAdmission
from router.processes.exchange import tell_load
from router.processes.shared_work import SharedWork


class CountingNode(QueueNode):
    """Says how many sequences it has."""

    running = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        self.running += 1
        try:
            async for delta in super().generate(request):
                yield delta
        finally:
            self.running -= 1

    def report(self) -> NodeReport:
        return msgspec.structs.replace(super().report(), stats=EngineStats(running=self.running))


@dataclass
class Routers:
    """`shares`: whether they tell each other. Made inside a running simulated loop."""

    machine: Machine
    count: int = 2
    shares: bool = True
    router: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cut = False
        self.nodes = QueueNodes(self.machine, CountingNode)
        self.each = [Load(self.machine, router=self.router, over=self.nodes) for _ in range(self.count)]
        self.shared: list[SharedAdmission] = []
        clock = LoopClock(asyncio.get_running_loop())
        for number, load in enumerate(self.each):
            load._count = number * 50_000  # names of requests differ
            work = SharedWork(load.cluster, clock)
            shared = SharedAdmission(
                clock,
                expected=self.count - 1,
                running=load.dispatcher.sequences_by_flow,
                nodes=work.own,
                places=work.places,
                tell_nodes=work.told,
            )
            self.shared.append(shared)
            if self.shares:
                load.admission.share(shared)
            load.prober.on_round.append(load.admission.wake)

    async def drive(self, flows: Sequence[Sequence[Flow]], seed: int) -> list[list[Seen]]:
        """What the clients of each router saw, of the flows that come by it."""
        tasks = [asyncio.create_task(load.prober.run()) for load in self.each]
        if self.shares:
            for number in range(self.count):
                tasks += [
                    asyncio.create_task(tell_load(self.shared[number], str(other), self._send, AdmissionLimits()))
                    for other in range(self.count)
                    if other != number
                ]
        try:
            each = zip(self.each, flows, strict=True)
            return await asyncio.gather(*(load.drive(own, seed + at) for at, (load, own) in enumerate(each)))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, url: str, body: bytes) -> None:
        await asyncio.sleep(self.machine.net_s)
        if self.cut:
            raise TimeoutError
        self.shared[int(url)].told(msgspec.msgpack.decode(body, type=AdmissionReport))
