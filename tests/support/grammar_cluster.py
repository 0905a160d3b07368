"""A router and simulated engines that are held to grammars, in virtual time, whose decoders die in the middle."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import httpx
import msgspec
from support.engine_fakes import CONFIG, lone_engine
from support.router_fakes import FakeNode, FakeNodes, Rig, make_rig

from engines.paged.loop import EngineLoop
from engines.sim.runner import EOS_TOKEN
from kvcore.errors import NodeUnavailableError
from kvcore.types import Role
from nodeapi.messages import GenerateRequest, TokenDelta

FAST = msgspec.structs.replace(CONFIG, max_context=2048, num_blocks=1024)


class EngineNode(FakeNode):
    """A node that answers as its engine does. `deaths`: after how many tokens the next legs of all nodes break off."""

    engine: EngineLoop
    deaths: list[int]

    async def _deltas(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        left = self.deaths.pop() if self.deaths else None
        async with aclosing(self.engine.generate(request)) as deltas:
            async for delta in deltas:
                yield delta
                left = left and max(0, left - len(delta.token_ids))
                if left == 0 and delta.finish_reason is None:
                    raise NodeUnavailableError(f"{self.id} died")


class GrammarCluster:
    """Made in a running simulated loop. `parser`: the dialect that the model speaks."""

    def __init__(self, rig: Rig, http: httpx.AsyncClient, deaths: list[int]) -> None:
        self._rig, self._http = rig, http
        self.deaths = deaths
        """After how many tokens a leg breaks off, the last one's first. Where there is none no leg does."""

    async def ask(self, **fields: Any) -> dict[str, Any]:
        """The only choice of a chat's answer, from nodes that are all up."""
        await self._rig.prober.probe()
        reply = await self._http.post("/v1/chat/completions", json={"max_tokens": 700, **fields})
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        return dict(choice)


@asynccontextmanager
async def grammar_cluster(parser: str) -> AsyncIterator[GrammarCluster]:
    """Of three decoders, whose model speaks the dialect `parser`."""
    deaths = list[int]()
    nodes = [EngineNode(name, Role.DECODER) for name in ("d0", "d1", "d2")]
    async with AsyncExitStack() as stack:
        for node in nodes:
            node.engine, node.deaths, node.eos = await stack.enter_async_context(lone_engine(FAST)), deaths, EOS_TOKEN
        rig = await make_rig(FakeNodes(list(nodes)), parser=parser)
        transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
        http = httpx.AsyncClient(transport=transport, base_url="http://router", timeout=None)
        yield GrammarCluster(rig, await stack.enter_async_context(http), deaths)
