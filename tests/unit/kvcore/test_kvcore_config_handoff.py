"""A cluster file whose nodes are vLLM servers that run already."""

import pytest
import yaml

from kvcore.config.checks import ports_of
from kvcore.config.file import load_config, node_config
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.handoff import HandoffKind

BASE = {
    "cluster": "plain",
    "handoff": "mooncake",
    "model": {"path": "models/m", "name": "m"},
    "nodes": {
        "p0": {"role": "prefiller", "url": "http://gpu-0:8100", "bootstrap_port": 9000},
        "d0": {"role": "decoder", "url": "https://gpu-1/vllm/"},
    },
}


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str, **changes: object) -> ClusterConfig:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump({**BASE, **changes}))
        return load_config(file, overrides)

    return load


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("handoff=kvferry", r"engine: missing \(only the servers"),
        ("kv={encrypt: true}", r"kv\.encrypt: with handoff mooncake vLLM moves KV itself, and nobody encrypts it"),
        ("handoff=nixel", r"handoff: 'nixel': not valid \(did you mean nixl\?\)"),
        ("handoff=nixl", r"nodes\.p0\.bootstrap_port: only prefillers with handoff mooncake"),
        ("nodes.d0.bootstrap_port=1", r"nodes\.d0\.bootstrap_port: only prefillers"),
        ("engine={kind: sim}", r"engine: nothing is started with handoff mooncake"),
        ("nodes.d0.url=null", r"nodes\.d0\.url: missing; with handoff mooncake every node"),
        ("nodes.s={role: store, url: 'http://h:1'}", r"nodes\.s\.role: with handoff mooncake there is no store"),
        ("nodes.d0.url=http://gpu-0:8100/", r"nodes\.p0\.url: .* is d0 already"),
        ("nodes.d0.url=gpu-0:8100", r"nodes\.d0\.url: 'gpu-0:8100': expected http://HOST:PORT"),
        ("nodes.d0.url=http://h:port", r"nodes\.d0\.url: .*expected http://HOST:PORT"),
        ("nodes.d0.url=http://me@h", r"nodes\.d0\.url: .*expected http://HOST:PORT"),
        ("nodes.d0.url=http://h:8100/v1", r"nodes\.d0\.url: .*leave out the /v1"),
        ("nodes.d0.port=8100", r"nodes\.d0\.port: means nothing beside url"),
        ("nodes.d0.host=h", r"nodes\.d0\.host: means nothing beside url"),
        ("nodes.d0.segment=1GiB", r"nodes\.d0\.segment: means nothing beside url"),
        ("nodes.d0.engine={kind: sim}", r"nodes\.d0\.engine: means nothing beside url"),
        ("nodes.d0.role=prefiller", r"nodes: no node has role decoder"),
    ],
)
def test_what_does_not_fit_servers_of_others_is_named(load, override, message):
    with pytest.raises(ConfigError, match=r"c\.yaml: " + message):
        load(override)


def test_a_url_needs_the_handoff_of_others(load):
    nodes = {"d0": {"role": "decoder", "url": "http://h:1"}, "d1": {"role": "decoder", "port": 5}}
    with pytest.raises(ConfigError, match=r"nodes\.d0\.url: only handoff nixl and mooncake drive servers"):
        load(handoff="kvferry", engine={"kind": "sim"}, nodes=nodes)


def test_nothing_but_the_router_listens_and_no_node_is_started(load):
    config = load()
    assert config.handoff is HandoffKind.MOONCAKE and config.engine is None
    assert [path for path, _, _ in ports_of(config)] == ["router.port"]
    with pytest.raises(ConfigError, match=r"'p0' is the vLLM server at http://gpu-0:8100, .*: start the router only"):
        node_config(config, "p0")


def test_the_model_path_is_relative_to_the_file(load, tmp_path):
    assert load("model.path=./m").model.path == str(tmp_path / "m")
    assert load().model.path == "models/m"  # no such folder: a hub id
