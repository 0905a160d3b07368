"""`kvferry serve`: what is decided for a machine, and the cluster file that comes of it."""

from pathlib import Path

import pytest

from kvcore.config.checks import check_cluster, engine_of
from kvcore.config.fields import ByteSize
from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig, TorchEngineConfig, VllmEngineConfig
from kvcore.errors import ConfigError
from kvcore.ports import listen
from kvferry import cli, serve
from kvferry.cluster_text import cluster_text
from kvferry.serve import find_model, parse_arguments
from kvferry.serve_plan import Machine, ServeOptions, choose_engine, cluster_name, plan_cluster
from kvferry.vllm_here import VllmBuild

CPU, GPU = VllmBuild("0.32.0+cpu", "cpu"), VllmBuild("0.33.0", "gpu")
GIB = 1 << 30
CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def machine(**changes: object) -> Machine:
    base: dict[str, object] = {"cores": (0, 1), "gpus": (), "memory_bytes": 16 * GIB, "vllm": CPU, "has_torch": True}
    return Machine(**{**base, **changes})


def options(**changes: object) -> ServeOptions:
    return ServeOptions(**{"folder": "/m", "name": "Qwen/Qwen3-8B", **changes})


def plan(options: ServeOptions, on: Machine) -> ClusterConfig:
    """As the nodes read it: through its text."""
    config, _ = plan_cluster(options, on)
    assert check_cluster(config) == []
    return config


def loaded(config: ClusterConfig, folder: Path, *overrides: str) -> ClusterConfig:
    file = folder / "cluster.yaml"
    file.write_text(cluster_text(config))
    return load_config(file, overrides)


def env_of(config: ClusterConfig, name: str) -> dict[str, str]:
    engine = engine_of(config, config.nodes[name])
    assert isinstance(engine, VllmEngineConfig)
    return engine.env


@pytest.mark.parametrize(
    ("wanted", "on", "message"),
    [
        (
            options(),
            machine(vllm=None, has_torch=False),
            "no engine: vLLM is not installed here .*make venv-vllm.* and torch",
        ),
        (options(engine="vllm"), machine(vllm=None), "--engine vllm: vLLM is not installed here"),
        (options(engine="vllm"), machine(vllm=GPU), "--engine vllm: vLLM 0.33.0 needs a GPU and this machine has none"),
        (options(engine="vllm"), machine(vllm=VllmBuild("0.30.0", "gpu")), "0.30.0, is of another version"),
        (options(engine="torch"), machine(has_torch=False), "no engine: torch and transformers are not installed here"),
        (
            options(engine="torch", args={"seed": 1}),
            machine(),
            "--arg seed: only vLLM has arguments, and the engine is torch",
        ),
        (options(args={"max_model_len": 5}), machine(), "--arg max_model_len: kvferry sets this itself"),
        (options(), machine(vllm=GPU, gpus=("0",)), "need 2 GPUs, this machine has 1: run one engine .*--colocated"),
        (options(args={"gpu-memory-utilization": 0.9}), machine(vllm=GPU, gpus=("0",)), "gpu-memory-utilization=0.45"),
        (
            options(args={"tensor-parallel-size": 2}),
            machine(vllm=GPU, gpus=("0", "1")),
            "need 4 GPUs, this machine has 2",
        ),
        (
            options(args={"tensor-parallel-size": 4}, colocated=True),
            machine(vllm=GPU, gpus=("0",)),
            "this machine has 1 GPUs",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(wanted, on, message):
    with pytest.raises(ConfigError, match=message):
        plan_cluster(wanted, on)


def test_vllm_is_taken_where_it_can_run_and_torch_otherwise_and_the_reason_is_said():
    assert choose_engine(None, machine()) == ("vllm", "0.32.0+cpu is installed")
    assert choose_engine("torch", machine()) == ("torch", "as asked")
    kind, why = choose_engine(None, machine(vllm=GPU))
    assert kind == "torch" and why == "since vLLM 0.33.0 needs a GPU and this machine has none"
    _, said = plan_cluster(options(), machine(vllm=None))
    assert said[0].startswith("engine: torch, since vLLM is not installed here")


def test_on_a_cpu_each_engine_has_cores_and_a_bounded_kv_of_its_own(tmp_path):
    config = loaded(plan(options(), machine(cores=(0, 1, 2, 3))), tmp_path)
    assert [(name, node.role, node.port) for name, node in config.nodes.items()] == [
        ("prefill-0", "prefiller", 8100),
        ("decode-0", "decoder", 8200),
    ]
    assert env_of(config, "prefill-0") == {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    assert env_of(config, "decode-0") == {"VLLM_CPU_OMP_THREADS_BIND": "2-3"}
    engine = engine_of(config, config.nodes["decode-0"])
    assert isinstance(engine, VllmEngineConfig)
    assert engine.args == {"enforce-eager": True, "kv-cache-memory-bytes": GIB}
    assert (config.model.dtype, config.kv.chunk_tokens, config.model.path) == ("float32", 128, "/m")
    assert (config.model.name, config.cluster) == ("Qwen/Qwen3-8B", "serve-qwen-qwen3-8b")
    assert config.nodes["decode-0"].segment == GIB


def test_one_engine_with_the_cache_has_all_cores(tmp_path):
    config = loaded(plan(options(colocated=True), machine()), tmp_path)
    assert list(config.nodes) == ["decode-0"]
    assert env_of(config, "decode-0") == {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}


def test_on_gpus_each_engine_has_its_own(tmp_path):
    config = loaded(plan(options(), machine(vllm=GPU, gpus=("0", "3"), memory_bytes=512 * GIB)), tmp_path)
    assert env_of(config, "prefill-0") == {"CUDA_VISIBLE_DEVICES": "0"}
    assert env_of(config, "decode-0") == {"CUDA_VISIBLE_DEVICES": "3"}
    assert (config.model.dtype, config.kv.chunk_tokens) == ("bfloat16", 256)
    assert config.nodes["decode-0"].segment == 32 * GIB
    engine = config.engine
    assert isinstance(engine, VllmEngineConfig) and engine.args == {}


def test_tensor_parallel_engines_have_several_gpus_or_cores_each(tmp_path):
    args = {"tensor_parallel_size": 2}
    config = loaded(plan(options(args=args), machine(vllm=GPU, gpus=tuple("0123"))), tmp_path)
    assert env_of(config, "decode-0") == {"CUDA_VISIBLE_DEVICES": "2,3"}
    config = loaded(plan(options(args=args), machine(cores=(0, 1, 2, 3))), tmp_path)
    assert env_of(config, "decode-0") == {"VLLM_CPU_OMP_THREADS_BIND": "2|3"}


def test_two_engines_share_a_gpu_when_told_how_much_each_may_take(tmp_path):
    args = {"gpu-memory-utilization": 0.45}
    config = loaded(plan(options(args=args), machine(vllm=GPU, gpus=("0",))), tmp_path)
    assert env_of(config, "prefill-0") == env_of(config, "decode-0") == {"CUDA_VISIBLE_DEVICES": "0"}


def test_what_is_asked_for_wins_over_what_would_be_chosen(tmp_path):
    args = {"enforce_eager": False, "block-size": 96}
    assert plan(options(args=args), machine()).kv.chunk_tokens == 192, "the context that is asked for is shorter"
    asked = options(
        args=args, kv_cache=ByteSize(5 << 20), segment=ByteSize(7 << 20), dtype="bfloat16", max_context=99, port=1234
    )
    config = loaded(plan(asked, machine()), tmp_path, "router.host=0.0.0.0", "security.open=true")
    engine = config.engine
    assert isinstance(engine, VllmEngineConfig)
    assert engine.args == {"enforce-eager": False, "kv-cache-memory-bytes": 5 << 20, "block-size": 96}
    assert (config.kv.chunk_tokens, config.model.dtype, config.model.max_context) == (96, "bfloat16", 99)
    assert (config.nodes["decode-0"].segment, config.router.port, config.router.host) == (7 << 20, 1234, "0.0.0.0")
    torch = plan(options(engine="torch", kv_cache=ByteSize(5 << 20)), machine(cores=tuple(range(6)))).engine
    assert torch == TorchEngineConfig(threads=3, kv_cache=ByteSize(5 << 20))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_the_text_of_a_configuration_reads_as_that_configuration(file, tmp_path):
    config = load_config(file)
    assert loaded(config, tmp_path) == config


def test_a_model_is_a_folder_or_a_hub_id(tmp_path):
    (tmp_path / "Some-Model").mkdir()
    assert find_model(str(tmp_path / "Some-Model")) == (str(tmp_path / "Some-Model"), "Some-Model")
    with pytest.raises(ConfigError, match="there is no such folder, and it is no id of a model on the hub"):
        find_model("nothing")


def test_vllms_arguments_are_yaml_values():
    assert parse_arguments(["seed=3", "enforce-eager", "load-format=auto", "a=[1, 2]", "b="]) == {
        "seed": 3,
        "enforce-eager": True,
        "load-format": "auto",
        "a": [1, 2],
        "b": None,
    }
    with pytest.raises(ConfigError, match=r"--arg a: the value is not valid YAML at line 1, column 2"):
        parse_arguments(["a=["])


def test_the_usual_ports_are_taken_unless_somebody_has_them(monkeypatch):
    with listen("127.0.0.1", 0) as held, listen("127.0.0.1", 0) as free:
        taken, usual = held.getsockname()[1], free.getsockname()[1]
        free.close()
        monkeypatch.setattr(serve, "USUAL_PORTS", (taken, usual, taken))
        first, second, third = serve.node_ports()
    assert second == usual and taken not in (first, third)


def test_the_command_writes_the_file_says_where_and_runs_it(tmp_path, monkeypatch, capsys):
    """Of the machine and the run only; both are made up."""
    runs = []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(serve, "this_machine", machine)
    monkeypatch.setattr("kvferry.doctor.checks.preflight", lambda config: None)
    monkeypatch.setattr("kvferry.launch.up.run_up", lambda *given: runs.append(given) or 0)
    model = tmp_path / "Tiny Model"
    model.mkdir()
    assert cli.main(["serve", str(model), "--set", "router.port=9000", "--arg", "seed=1", "--segment", "1MiB"]) == 0
    file = tmp_path / "kvferry/serve-tiny-model/cluster.yaml"
    assert runs == [(file, [], None)]
    config = load_config(file)
    assert (config.router.port, config.model.name, config.nodes["prefill-0"].segment) == (9000, "Tiny Model", 1 << 20)
    assert env_of(config, "decode-0") == {"VLLM_CPU_OMP_THREADS_BIND": "1"}
    assert [path.name for path in file.parent.iterdir()] == ["cluster.yaml"]
    out = capsys.readouterr().out
    assert "engine: vllm, 0.32.0+cpu is installed" in out and str(file) in out


def test_a_machine_that_is_not_fit_leaves_the_file_of_a_running_cluster_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(serve, "this_machine", machine)
    file = tmp_path / "kvferry/serve-m/cluster.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    (tmp_path / "m").mkdir()
    assert cli.main(["serve", str(tmp_path / "m")]) == 2
    assert "config.json is missing" in capsys.readouterr().err
    assert file.read_text() == "theirs" and len(list(file.parent.iterdir())) == 1


def test_names_of_clusters_may_be_folders():
    assert cluster_name("Qwen/Qwen3-8B") == "serve-qwen-qwen3-8b"
    assert cluster_name("../..") == "serve-model"
