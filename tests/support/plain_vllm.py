"""A whole router over servers that are not ours, on a free port, in this process: as `router --config` runs it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from support.fake_vllm_server import MODEL, FakeVllm
from support.ports import free_ports
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, RouterConfig, ServiceConfig
from kvcore.process.service import Lifecycle
from kvcore.types import Role
from router.service import run_router

VOCAB = 512


def write_model_folder(folder: Path) -> Path:
    """What the router reads of a model: a tokenizer of bytes, a chat template, config.json."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2's byte-level alphabet writes bytes
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps({**shape, "vocab_size": VOCAB, "eos_token_id": 0}))
    return folder


def plain_config(fakes: dict[str, FakeVllm], model: Path, **router: object) -> ClusterConfig:
    """Of servers that listen already."""
    (port,) = free_ports(1)
    kind = next(iter(fakes.values())).world.kind
    bounds = {"probe_interval_s": 0.05, "connect_timeout_s": 1.0, "min_prefill_tokens": 8, **router}
    return ClusterConfig(
        cluster="plain",
        handoff=kind,
        model=ModelConfig(path=str(model), name=MODEL),
        nodes={
            name: NodeConfig(role=fake.role, url=fake.url, bootstrap_port=fake.bootstrap_port)
            for name, fake in fakes.items()
        },
        router=RouterConfig(port=port, **bounds),  # type: ignore[arg-type]
        service=ServiceConfig(drain_s=0.2),
    )


class _Over(Exception):  # noqa: N818 - ends the TaskGroup
    pass


@asynccontextmanager
async def running_router(config: ClusterConfig, *, healthy: bool = True) -> AsyncIterator[aiohttp.ClientSession]:
    """A session with the router as its base; entered once it serves and, if `healthy`, all nodes are usable."""
    url = f"http://127.0.0.1:{config.router.port}"
    try:
        async with asyncio.TaskGroup() as tasks:
            async with AsyncExitStack() as stack:
                lifecycle = Lifecycle(stack, tasks)
                serving = asyncio.create_task(run_router(config, lifecycle))
                async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=20)) as session:
                    await _until_ready(session, serving, lifecycle, healthy)
                    yield session
                lifecycle.stopping.set()
                await serving
            raise _Over
    except* _Over:
        pass


async def _until_ready(
    session: aiohttp.ClientSession, serving: "asyncio.Task[None]", lifecycle: Lifecycle, healthy: bool
) -> None:
    async with asyncio.timeout(60):
        while not lifecycle.is_ready:
            if serving.done():
                serving.result()
            await asyncio.sleep(0.005)
        while healthy and not all(node["healthy"] for node in (await nodes(session)).values()):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def nodes(session: aiohttp.ClientSession) -> dict[str, dict[str, object]]:
    """As `/v1/cluster` shows them, by name."""
    async with session.get("/v1/cluster") as reply:
        return {node["id"]: node for node in (await reply.json())["nodes"]}


async def record(session: aiohttp.ClientSession) -> dict[str, object]:
    """What the router keeps of the newest request."""
    async with session.get("/v1/requests") as reply:
        newest: dict[str, object] = (await reply.json())["requests"][0]
        return newest


def roles(fakes: dict[str, FakeVllm], role: Role) -> list[FakeVllm]:
    """Those of this role."""
    return [fake for fake in fakes.values() if fake.role is role]
