"""What the doctor says about vLLM engines, on machines that are made up."""

import json

import msgspec
import pytest

from engines.vllm import adapters
from kvcore.config.fields import ByteSize
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, TorchEngineConfig, VllmEngineConfig
from kvcore.types import Role
from kvferry import vllm_here
from kvferry.doctor import checks as doctor
from kvferry.doctor import vllm as doctor_vllm
from kvferry.doctor.findings import Context
from kvferry.doctor.vllm import check_adapters, check_cores, check_vllm, host_bytes
from kvferry.vllm_here import VllmBuild, core_list, cuda_devices, parse_cores, parse_size, split_cores

CPU, GPU = VllmBuild("0.32.0+cpu", "cpu"), VllmBuild("0.33.0", "gpu")
BIND = "VLLM_CPU_OMP_THREADS_BIND"


def engine(cores: str | None = None, **args: object) -> VllmEngineConfig:
    given = {name.replace("_", "-"): value for name, value in args.items()}
    return VllmEngineConfig(args=given, env={} if cores is None else {BIND: cores})


def context(*engines: VllmEngineConfig | TorchEngineConfig, path: str = "/no/model") -> Context:
    nodes = {
        f"d{index}": NodeConfig(role=Role.DECODER, port=8200 + index, segment=ByteSize(1), engine=own)
        for index, own in enumerate(engines)
    }
    model = ModelConfig(path=path, name="m")
    return Context(ClusterConfig(cluster="c", model=model, engine=engines[0], nodes=nodes), all_here=True)


@pytest.fixture
def machine(monkeypatch):
    def machine(
        build: VllmBuild | None = CPU, gpus: tuple[str, ...] = (), cores: tuple[int, ...] = (0, 1, 2, 3)
    ) -> None:
        for module in (doctor, doctor_vllm):
            monkeypatch.setattr(module, "installed_vllm", lambda: build)
        monkeypatch.setattr(doctor_vllm, "cuda_devices", lambda: gpus)
        monkeypatch.setattr(doctor_vllm, "cores", lambda: cores)

    return machine


@pytest.mark.parametrize(
    ("build", "gpus", "detail", "remedy"),
    [
        (None, (), "vLLM is not installed here", "make venv-vllm"),
        (VllmBuild("0.31.2+cpu", "cpu"), (), "vLLM 0.31.2+cpu is here, kvferry's connector is for >=0.32,<0.34", "pip"),
        (VllmBuild("0.34.0", "gpu"), ("0",), "vLLM 0.34.0 is here", "pip install 'vllm>=0.32,<0.34'"),
        (VllmBuild("dev", "gpu"), ("0",), "vLLM dev is here", "pip"),
        (GPU, (), "vLLM 0.33.0 needs a GPU, and this machine has none", "make venv-vllm"),
    ],
)
def test_a_vllm_that_cannot_run_here_is_told_with_what_to_do(machine, build, gpus, detail, remedy):
    machine(build, gpus)
    (finding,) = check_vllm(context(engine()))
    assert not finding.ok and detail in finding.detail and remedy in finding.remedy


def test_a_vllm_that_fits_is_named_and_no_one_asks_where_no_engine_is_vllm(machine):
    machine(CPU)
    assert [f.detail for f in check_vllm(context(engine()))] == ["0.32.0+cpu, for the CPU"]
    machine(GPU, ("0", "1"))
    assert [f.detail for f in check_vllm(context(engine()))] == ["0.33.0, 2 GPUs (0, 1)"]
    machine(None)
    assert not check_vllm(context(TorchEngineConfig())) and not check_cores(context(TorchEngineConfig()))


def on_gpus(visible: str | None, **args: object) -> VllmEngineConfig:
    found = engine(**args)
    return msgspec.structs.replace(found, env={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


@pytest.mark.parametrize(
    ("engines", "detail"),
    [
        ([on_gpus("0"), on_gpus("2")], "d1: takes GPU 2, this machine has 0, 1"),
        ([on_gpus("1", tensor_parallel_size=2)], "d0: tensor-parallel-size 2 on 1 GPUs"),
        ([on_gpus(None, tensor_parallel_size=4)], "d0: takes GPU 2, this machine has 0, 1"),
        ([on_gpus(None), on_gpus(None)], "GPU 0: of its memory d0 0.92 and d1 0.92 are wanted"),
        ([on_gpus("1", gpu_memory_utilization=0.5), on_gpus("1", gpu_memory_utilization="0.6")], "d0 0.5 and d1 0.6"),
        ([on_gpus("0,1", tensor_parallel_size=2), on_gpus("1")], "GPU 1: of its memory d0 0.92 and d1 0.92"),
    ],
)
def test_engines_that_have_no_gpu_of_their_own_are_told(machine, monkeypatch, engines, detail):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine(GPU, ("0", "1"))
    _, finding = check_vllm(context(*engines))
    assert not finding.ok and detail in finding.detail and "CUDA_VISIBLE_DEVICES" in finding.remedy


@pytest.mark.parametrize(
    "engines",
    [
        [on_gpus("0"), on_gpus("1")],
        [on_gpus("0,1", tensor_parallel_size=2)],
        [on_gpus("0", gpu_memory_utilization=0.45), on_gpus("0", gpu_memory_utilization=0.45)],
        [on_gpus("0"), on_gpus("0", kv_cache_memory_bytes="4G")],
        [on_gpus("GPU-8f6e")],
    ],
)
def test_engines_that_fit_on_the_gpus_are_nobodys_business(machine, monkeypatch, engines):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine(GPU, ("0", "1"))
    assert [finding.ok for finding in check_vllm(context(*engines))] == [True]


def test_two_engines_on_a_cpu_must_say_how_much_memory_their_kv_takes(machine):
    machine(CPU)
    _, finding = check_vllm(context(engine(), engine(kv_cache_memory_bytes="1G")))
    assert not finding.ok and finding.detail.startswith("d0: nothing says how much memory")
    assert len(check_vllm(context(engine(kv_cache_memory_bytes="1G"), engine(kv_cache_memory_bytes=5)))) == 1
    assert len(check_vllm(context(engine()))) == 1


@pytest.mark.parametrize(
    ("cores", "detail"),
    [
        (("0", None), "d1 is not bound to cores of its own"),
        (("0-1", "1-2"), "core 1 is d0's and d1's"),
        (("0", "3-4"), "d1: this machine gives us no core 4, only 0,1,2,3"),
        (("0", "x"), "d1: 'x' is not a list of cores"),
    ],
)
def test_engines_that_share_cores_are_told(machine, cores, detail):
    machine(CPU)
    (finding,) = check_cores(context(*(engine(own) for own in cores)))
    assert not finding.ok and detail in finding.detail and BIND in finding.remedy


def test_cores_are_shown_and_are_nobodys_business_on_a_gpu(machine):
    machine(CPU)
    assert [f.detail for f in check_cores(context(engine("0"), engine("2-3")))] == ["d0: 0, d1: 2,3"]
    assert [f.detail for f in check_cores(context(engine()))] == ["d0: chosen by vLLM"]
    machine(GPU, ("0",))
    assert not check_cores(context(engine(), engine()))


def test_memory_counts_processes_weights_in_the_dtype_they_are_loaded_in_and_kv_of_each_rank(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    model = ModelConfig(path=str(tmp_path), name="m", dtype="float32")
    bare = host_bytes(engine(kv_cache_memory_bytes=0), ModelConfig(path="/no", name="m"), CPU, 256)
    assert host_bytes(engine(kv_cache_memory_bytes="1K"), model, CPU, 256) == bare + 2000 + 1024
    two = host_bytes(engine(kv_cache_memory_bytes="1k", tensor_parallel_size=2), model, CPU, 256)
    assert two == bare + (500 << 20) + 2000 + 2000
    in_env = VllmEngineConfig(env={"VLLM_CPU_KVCACHE_SPACE": "2"})
    assert host_bytes(in_env, model, CPU, 256) == bare + 2000 + (2 << 30)


def test_beside_a_gpu_memory_counts_processes_of_each_rank_and_chunks_on_their_way(tmp_path):
    model = ModelConfig(path=str(tmp_path), name="m", dtype="bfloat16")
    one, two = (host_bytes(engine(tensor_parallel_size=ranks), model, GPU, 256) for ranks in (1, 2))
    assert (one, two - one) == (2_600 << 20, 1_600 << 20)
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    for config in (shape, {"text_config": shape}, shape | {"head_dim": 128}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert host_bytes(engine(), model, GPU, 256) == one + 8 * (32 << 20)
    for config in ([], {"num_hidden_layers": 32}, shape | {"num_attention_heads": None}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert host_bytes(engine(), model, GPU, 256) == one


def test_a_model_for_vllm_needs_a_config_and_the_routers_tokenizer_whatever_its_architecture(tmp_path):
    def said() -> list[str]:
        return [f.detail for f in doctor.check_model(context(engine(), path=str(tmp_path)))]

    assert "config.json is missing" in said()[0]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GlmForCausalLM"]}))
    assert "tokenizer.json is missing" in said()[0]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert said()[0].startswith("GlmForCausalLM, in ")


@pytest.mark.parametrize(
    ("cores", "engines", "ranks", "bound"),
    [
        ((0, 1), 2, 1, ["0", "1"]),
        ((0, 1), 1, 1, ["0-1"]),
        ((0, 1), 1, 2, ["0|1"]),
        ((4, 5, 6, 9), 2, 1, ["4-5", "6,9"]),
        (tuple(range(8)), 2, 1, ["0-2", "4-6"]),  # one of four is left for the other processes
        (tuple(range(16)), 2, 2, ["0-2|4-6", "8-10|12-14"]),
        ((3,), 2, 1, ["3", "3"]),
    ],
)
def test_cores_are_split_so_that_no_two_engines_share_one_while_there_are_enough(cores, engines, ranks, bound):
    assert split_cores(cores, engines, ranks) == bound
    assert set.union(*(parse_cores(text) or set() for text in bound)) <= set(cores)


def test_lists_of_cores_and_sizes_are_read_as_vllm_reads_them():
    assert core_list([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert parse_cores("0-2, 5|7") == {0, 1, 2, 5, 7}
    assert parse_cores("auto") is None and parse_cores("nobind") is None
    assert [parse_size(text) for text in ("300M", "300m", "1.5g", 7, "x", True, None)] == [
        300 << 20,
        300 * 10**6,
        1_500_000_000,
        7,
        None,
        None,
        None,
    ]


def test_gpus_are_those_that_the_environment_leaves_else_those_that_nvidia_smi_lists_else_those_in_proc(
    tmp_path, monkeypatch
):
    gpus = tmp_path / "gpus"
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (gpus / name).mkdir(parents=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda_devices(gpus) == ("0", "1")
    assert cuda_devices(tmp_path / "none") == ()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho '  MIG 1g.10gb Device 0: (UUID: MIG-1)'\n")
    smi.chmod(0o755)
    assert cuda_devices(gpus) == ("0",)
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert cuda_devices(gpus) == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert cuda_devices(gpus) == ("2", "GPU-5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_devices(gpus) == ()


def test_the_installed_build_is_told_by_its_version(monkeypatch):
    versions = {"vllm": "0.32.0+cpu"}
    monkeypatch.setattr(vllm_here.importlib.metadata, "version", versions.__getitem__)
    assert vllm_here.installed_vllm() == CPU and CPU.supported
    versions["vllm"] = "0.33.1+cu130"
    found = vllm_here.installed_vllm()
    assert found is not None and found.platform == "gpu" and found.supported


def test_adapters_are_found_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "DIGEST_CACHE", tmp_path / "digests.json")
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / adapters.CONFIG).write_text(json.dumps({"r": 8}))
    given = context(engine())
    paths = {"sql": str(tmp_path / "sql"), "far": "org/far"}
    config = msgspec.structs.replace(given.config, model=msgspec.structs.replace(given.config.model, adapters=paths))
    here = Context(config, all_here=True)
    (finding,) = check_adapters(here)
    assert not finding.ok and "model.adapters.sql" in finding.detail
    (tmp_path / "sql" / adapters.WEIGHTS[0]).write_bytes(b"x")
    (finding,) = check_adapters(here)
    assert (finding.ok, finding.detail) == (True, "sql (rank 8), far (looked up on the hub at start)")
    assert check_adapters(given) == []
