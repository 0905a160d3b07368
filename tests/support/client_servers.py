"""What tests/clients talks to, as a process of its own, since clients live in an environment that kvferry is not in.

`torch`: a cluster of two nodes on the demo model, whose folder is `model`. `tools`: a router whose model calls a tool
where it has no result of one yet. `late`: a router that has much to do: whoever asks it for a first token within a
second gets a 429. `dead`: an address at which nobody listens. Run by tests/clients/conftest.py,
`python -m support.client_servers FOLDER`: a line of JSON with all this once they serve; ends when its standard input
does.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from support.cluster import cluster
from support.ports import free_ports
from support.router_fakes import calls_then, make_rig, serving, until

from kvcore.process.asgi import AsgiServer
from kvferry.demo.model import prepare_demo_model

CALLS = (
    "<think>\nTwo cities.\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)
ANSWER = "Rain there, sun here."
MODEL = "demo"


@asynccontextmanager
async def late() -> AsyncIterator[str]:
    """The address of a router whose prefillers are at a prompt each, of 1,000 tokens, and compute one a second."""
    rig, gate = await make_rig(min_prefill_tokens=0), asyncio.Event()
    for node in rig.nodes.nodes:
        node.prefill_gate, node.wait_for_handoff = gate, True
        for now in (0.0, 100.0):
            rig.cluster.nodes[node.id].rates.prefilled(100, 100.0, now)
        rig.cluster.nodes[node.id].touch()
    server = AsgiServer(rig.app, "127.0.0.1", 0)
    await server.start()
    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(total=None)) as session:
        asked = [
            asyncio.create_task(session.post("/v1/completions", json={"prompt": f"{number}" * 1000, "max_tokens": 4}))
            for number in range(2)
        ]
        await until(lambda: sum(len(node.prefills) for node in rig.nodes.nodes) == 2)
        try:
            yield server.url
        finally:
            gate.set()
            await asyncio.gather(*asked)
            await server.aclose()


async def serve(folder: Path) -> None:
    """All of them, until standard input ends."""
    model = prepare_demo_model()
    async with (
        cluster(folder, engine="torch", model=model, name=MODEL, prefillers=1, decoders=1) as handle,
        serving(calls_then(CALLS, ANSWER), "hermes") as tools,
        late() as busy,
    ):
        dead = f"http://127.0.0.1:{free_ports(1)[0]}"
        served = {"torch": handle.url, "tools": tools, "late": busy, "dead": dead, "model": str(model)}
        print("SERVED " + json.dumps(served), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
