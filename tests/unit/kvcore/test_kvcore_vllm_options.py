"""The vllm section of a cluster file: what it may say, and how a node's is laid over the cluster's."""

import pytest
import yaml

from kvcore.config.checks import engine_of
from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig, ModelConfig, VllmEngineConfig
from kvcore.config.vllm_options import RESERVED, argument, check_arguments, engine_environment
from kvcore.errors import ConfigError

BASE = {
    "cluster": "c",
    "model": {"path": "/models/m", "name": "m"},
    "engine": {"kind": "vllm", "args": {"max_num_seqs": 8, "enforce-eager": True}, "env": {"A": "1", "B": "2"}},
    "nodes": {"p": {"role": "prefiller", "port": 8100}, "d": {"role": "decoder", "port": 8200}},
}


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str, **changes: object) -> ClusterConfig:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump({**BASE, **changes}, sort_keys=False))
        return load_config(file, overrides)

    return load


def engine(config: ClusterConfig, node: str) -> VllmEngineConfig:
    found = engine_of(config, config.nodes[node])
    assert isinstance(found, VllmEngineConfig)
    return found


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("model", "give model.path"),
        ("served_model_name", "give model.name"),
        ("dtype", "give model.dtype"),
        ("max-model-len", "give model.max_context"),
        ("--max_model_len", "give model.max_context"),
        ("max-model", "give model.max_context"),  # vLLM's parser would take the beginning of a name
        ("host", "router.host"),
        ("port", "router.port"),
        ("kv-transfer-config", "`handoff` chooses another connector"),
        ("kv_transfer_config.kv_connector", "`handoff` chooses another connector"),
        ("kv-connector", "`handoff` chooses another connector"),
        ("kv-load-failure-policy", "is computed"),
        ("no-disable-hybrid-kv-cache-manager", "one kind of block"),
        ("data-parallel-size", "add nodes"),
        ("kv-offloading-size", "give nodes.NAME.segment"),
        ("tokenizer", "the router reads the same folder"),
        ("enable_lora", "give model.adapters"),
        ("lora-modules", "give model.adapters"),
        ("lora-dtype", "give model.adapters"),
        ("max-cpu-loras", "stay in main memory"),
        ("", "not the name of an argument"),
        ("max-num-seqs", "given twice, as max_num_seqs too"),
    ],
)
def test_what_kvferry_sets_itself_is_refused_and_the_error_says_where_to_set_it(load, name, instead):
    with pytest.raises(ConfigError) as caught:
        load(engine={"kind": "vllm", "args": {"max_num_seqs": 8, name: "x"}})
    (line,) = str(caught.value).splitlines()
    assert f"c.yaml: engine.args.{name}: 'x': " in line and instead in line


def test_what_kvferry_does_not_set_goes_through_as_it_is_written(load):
    args = {
        "enable-prefix-caching": False,
        "block-size": 64,
        "compilation_config": {"level": 0},
        "kv-cache-dtype": "fp8",
    }
    assert engine(load(engine={"kind": "vllm", "args": args}), "d").args == args
    assert not list(check_arguments({"model-impl": "x", "kv-cache-memory-bytes": 1, "load-format": "auto"}))


def test_a_reserved_name_of_the_cluster_is_told_once_and_a_nodes_own_at_the_node(load):
    with pytest.raises(ConfigError) as caught:
        load("engine.args.dtype=half", "nodes.d.engine.args.model=x", "nodes.p.engine.env.X=1")
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "engine.args.dtype",
        "nodes.d.engine.args.model",
    ]


def test_a_chunk_is_a_whole_number_of_the_blocks_that_args_give(load):
    load("engine.args.block_size=64", "kv.chunk_tokens=128")
    for override in ("engine.args.block_size=96", "nodes.d.engine.args.block-size=96"):
        with pytest.raises(ConfigError, match=r"args\.block-size: 96 does not divide kv\.chunk_tokens 256"):
            load(override)


def test_a_nodes_section_is_laid_over_the_clusters_name_by_name(load):
    config = load("nodes.d.engine={args: {max-num-seqs: 2, seed: 1}, env: {B: 3, C: 0-1}, max_requests: 5}")
    assert engine(config, "p") == VllmEngineConfig(
        args={"max_num_seqs": 8, "enforce-eager": True}, env={"A": "1", "B": "2"}
    )
    assert engine(config, "d") == VllmEngineConfig(
        args={"enforce-eager": True, "max-num-seqs": 2, "seed": 1}, env={"A": "1", "B": "3", "C": "0-1"}, max_requests=5
    )


def test_a_node_may_take_an_argument_of_the_clusters_back_and_leaves_fields_it_does_not_name(load):
    config = load("engine.save_output=false", "nodes.d.engine={kind: vllm, args: {enforce_eager: null}}")
    assert engine(config, "d").args == {"max_num_seqs": 8, "enforce_eager": None}
    assert not engine(config, "d").save_output


def test_only_vllm_is_laid_over_vllm(load):
    with pytest.raises(ConfigError, match="several kinds"):
        load("nodes.d.engine={kind: torch}")
    with pytest.raises(ConfigError, match=r"nodes\.d\.engine\.kind: missing"):
        load("nodes.d.engine={env: {A: 1}}", engine={"kind": "torch"})
    with pytest.raises(ConfigError, match=r"nodes\.d\.engine\.arg: .*unknown key \(did you mean args\?\)"):
        load("nodes.d.engine={arg: {}}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.args=5", r"engine\.args: 5: expected a section"),
        ("engine.env=[1]", r"engine\.env: \[1\]: expected a section"),
        ("engine.env.X=true", r"engine\.env\.X: True: expected str"),
        ("engine.env.A=B=C", None),
        ("engine.env={'A=B': '1'}", r"engine\.env\.A=B: not a variable that a process can have"),
        ("nodes.d.engine=5", r"nodes\.d\.engine: 5: expected a section"),
        ("nodes.d.engine={env: {A: [1]}}", r"nodes\.d\.engine\.env\.A: \[1\]: expected str"),
        ("nodes=5", r"nodes: 5: expected a section"),
    ],
)
def test_a_section_of_the_wrong_shape_is_named(load, override, message):
    if message is None:
        assert engine(load(override), "d").env["A"] == "B=C"
        return
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_the_environment_says_what_vllm_would_else_guess_and_the_file_has_the_last_word():
    folder, hub = ModelConfig(path="/models/m", name="m"), ModelConfig(path="a/b", name="b")
    plain = VllmEngineConfig()
    assert engine_environment(plain, folder, "10.0.0.1") == {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "10.0.0.1",
    }
    assert engine_environment(plain, hub, "gpu-0") == {"VLLM_NO_USAGE_STATS": "1"}
    own = VllmEngineConfig(env={"VLLM_HOST_IP": "10.1.0.1", "CUDA_VISIBLE_DEVICES": "1"})
    assert engine_environment(own, hub, "::1") == {"VLLM_NO_USAGE_STATS": "1"} | own.env


def test_an_argument_is_found_however_it_is_spelt():
    assert argument({"--block_size": 64}, "block-size") == 64
    assert argument({}, "block-size") is None
    assert all(name == name.lower() and "_" not in name for name in RESERVED)
