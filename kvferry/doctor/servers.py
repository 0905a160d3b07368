"""The check of vLLM servers that run already: each answers, serves the model and, with mooncake, names its engine."""

import asyncio

from kvcore.config.schema import ClusterConfig, NodeConfig
from kvcore.errors import KVFerryError, ModelLoadError
from kvferry.doctor.findings import Context, Finding
from router.nodes.vllm_client import VllmClient, node_url, server_key
from router.nodes.vllm_model import ModelFacts, read_model_facts

_START_IT = "start it with NixlConnector or MooncakeConnector (docs/plain-vllm.md), or correct its url"


def check_servers(context: Context) -> list[Finding]:
    """Ask each as the router will. Blocking, as long as `router.connect_timeout_s` at most."""
    config = context.config
    if config.handoff.traits.has_store:
        return []
    try:
        facts = read_model_facts(config)
    except ModelLoadError as error:
        return [Finding("model", False, error.message, "model.path is where the router looks for its tokenizer")]
    return asyncio.run(_ask_all(config, facts))


async def _ask_all(config: ClusterConfig, facts: ModelFacts) -> list[Finding]:
    client = VllmClient(config, facts, max_connections=len(config.nodes), api_key=server_key())
    try:
        return await asyncio.gather(*(_ask(client, config, name, node) for name, node in config.nodes.items()))
    finally:
        await client.aclose()


async def _ask(client: VllmClient, config: ClusterConfig, name: str, node: NodeConfig) -> Finding:
    subject = f"server {name}"
    try:
        report = await client.info(node_url(node), timeout_s=config.router.connect_timeout_s)
    except KVFerryError as error:
        return Finding(subject, False, error.message, _START_IT)
    assert report.engine is not None, "every server has one"
    peer = report.engine.kv_peer.get("remote_engine_id")
    fetched = f", KV is fetched from its engine {peer}" if peer else ""
    return Finding(subject, True, f"{node.role} at {node.url}, context {report.engine.max_context}{fetched}")
