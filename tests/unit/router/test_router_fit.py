"""Nodes of another cluster, model or tokenizer are never routed to, and whoever asks is told why."""

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.router_fakes import VOCAB, FakeNode, FakeNodes, Rig, make_rig
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, TorchEngineConfig
from kvcore.errors import NodeUnavailableError
from kvcore.model_folder import file_digest
from kvcore.types import Role
from nodeapi.sampling import SamplingParams
from router.requests.spec import RequestSpec
from router.text.tokenizer import ByteTokenizer, make_tokenizer


def route(rig: Rig) -> tuple[str | None, str]:
    """(prefiller, decoder) of one request. Raises NodeUnavailableError."""
    run = rig.dispatcher.open(RequestSpec("r", list(range(100)), SamplingParams(max_tokens=4)))
    run.drop()
    assert run.record.route is not None
    return run.record.route.prefiller, run.record.route.decoder


def cluster_of(**second: Any) -> FakeNodes:
    """p0 and d0 of the router's own cluster, whose name is `test`; p1 and d1 with what is given."""
    own: dict[str, Any] = {"cluster": "test", "tokenizer": "t"}
    return FakeNodes(
        [
            FakeNode("p0", Role.PREFILLER, **own),
            FakeNode("d0", Role.DECODER, **own),
            FakeNode("p1", Role.PREFILLER, **own | second),
            FakeNode("d1", Role.DECODER, **own | second),
        ]
    )


def with_tokenizer(digest: str) -> ByteTokenizer:
    tokenizer = ByteTokenizer(VOCAB)
    tokenizer.digest = digest
    return tokenizer


async def status_of(rig: Rig, path: str = "/v1/cluster") -> Any:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        return (await client.get(path)).json()


@pytest.mark.parametrize(
    ("foreign", "reason"),
    [
        ({"cluster": "other"}, "node d1 at http://there is of cluster 'other', not 'test'"),
        ({"model": "other"}, "node d1 at http://there serves model 'other', not 'fake-model'"),
        ({"model": "other", "cluster": ""}, "node d1 at http://there serves model 'other', not 'fake-model'"),
        ({"tokenizer": "u" * 64}, "its tokenizer is not the router's (sha256 uuuuuuuuuuuu and t)"),
    ],
)
async def test_a_node_of_another_cluster_model_or_tokenizer_gets_nothing_and_is_named(
    foreign: dict[str, str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="router"):
        rig = await make_rig(cluster_of(**foreign), with_tokenizer("t"))
        for _ in range(3):
            await rig.prober.probe()
    assert {route(rig) for _ in range(8)} == {("p0", "d0")}
    said = [record for record in caplog.records if "node=d1" in record.message]
    assert [(record.levelname, reason in record.message) for record in said] == [("WARNING", True)], "once"
    nodes = {node["id"]: node for node in (await status_of(rig))["nodes"]}
    assert not nodes["d1"]["healthy"] and nodes["d1"]["reason"].startswith(reason)
    assert nodes["d0"]["healthy"]


@pytest.mark.parametrize(
    "second", [{"cluster": ""}, {"cluster": "test"}, {"tokenizer": ""}, {"cluster": "", "tokenizer": ""}]
)
async def test_a_node_that_says_less_of_itself_is_used(second: dict[str, str]) -> None:
    """As older ones do; and a simulated engine has no tokenizer."""
    rig = await make_rig(cluster_of(**second), with_tokenizer("t"))
    assert {route(rig)[1] for _ in range(8)} == {"d0", "d1"}


async def test_a_router_without_a_tokenizer_file_takes_any() -> None:
    rig = await make_rig(cluster_of(tokenizer="u"))
    assert {route(rig)[1] for _ in range(8)} == {"d0", "d1"}


async def test_where_no_node_has_the_routers_tokenizer_requests_are_refused_with_the_cause() -> None:
    nodes = FakeNodes([FakeNode(name, Role.DECODER, tokenizer="t") for name in ("d0", "d1")])
    rig = await make_rig(nodes, with_tokenizer("another"))
    with pytest.raises(NodeUnavailableError, match=r"d0: its tokenizer is not the router's .*; d1: its tokenizer"):
        route(rig)
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        reply = await client.post("/v1/completions", json={"model": "fake-model", "prompt": "hello", "max_tokens": 4})
        assert reply.status_code == 503
        assert "d0: its tokenizer is not the router's (sha256 t and another)" in reply.json()["error"]["message"]
        health = await client.get("/health")
        assert health.status_code == 503 and "tokenizer" in health.text
    assert not nodes["d0"].generates


async def test_the_longest_context_is_that_of_nodes_that_fit() -> None:
    rig = await make_rig(cluster_of(cluster="other", max_context=1 << 20))
    assert rig.cluster.max_context() == rig.nodes["d0"].max_context
    rig.nodes["d1"].cluster = "test"
    await rig.prober.probe()
    assert rig.cluster.max_context() == 1 << 20


async def test_a_node_that_comes_back_as_one_of_ours_is_used() -> None:
    rig = await make_rig(cluster_of(model="other"))
    rig.nodes["d1"].model = "fake-model"
    await rig.prober.probe()
    assert {route(rig)[1] for _ in range(8)} == {"d0", "d1"}


def test_the_routers_digest_is_that_of_the_file_which_engines_hash_too(tmp_path: Path) -> None:
    FastTokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    config = ClusterConfig(
        cluster="c",
        model=ModelConfig(path=str(tmp_path), name="m"),
        engine=TorchEngineConfig(),
        nodes={"d": NodeConfig(role=Role.DECODER, port=1)},
    )
    assert make_tokenizer(config).digest == file_digest(tmp_path / "tokenizer.json")
