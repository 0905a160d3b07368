"""What is wrong with a model folder is said by name, and provenance tells weights apart."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import make_tiny_model

from engines.model_files import ModelFiles, check_model_files
from engines.provenance import FileStamp, check_unchanged, weights_digest
from engines.torch.engine import build_torch_engine, check_memory, count_blocks
from engines.torch.model import LoadedModel, load_model
from engines.torch.spec import attention_text, build_kv_spec
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvcore.errors import ConfigError, ModelLoadError
from kvcore.kv_parts import differing_parts

ENGINE = TorchEngineConfig(block_size=16)


def load(folder: Path, **settings: object) -> LoadedModel:
    return load_model(ModelConfig(path=str(folder), name="m", **settings), ENGINE)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model("llama", tmp_path / "model")


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "broken config": (lambda f: truncate(f / "config.json"), r"config\.json is corrupt"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "architecture": (lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel.*LlamaForCausalLM"),
    "another model's type": (lambda f: edit_config(f, model_type="mistral"), "contradicts itself.*'llama'.*'mistral'"),
    "another architecture": (
        lambda f: edit_config(f, architectures=["MistralForCausalLM"]),
        "contradicts itself.*'mistral'.*'llama'",
    ),
    "no type": (lambda f: edit_config(f, model_type=None), "contradicts itself"),
    "a window that Llama's code ignores": (lambda f: edit_config(f, sliding_window=48), "sliding_window"),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), r"quantized \(awq\).*vllm"),
    "dynamic rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "'dynamic'",
    ),
    "nonsense shape": (lambda f: edit_config(f, hidden_size="many"), r"config\.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights are missing"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors is truncated or corrupt"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or corrupt"),
    "zeros as weights": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 64), "truncated or corrupt"),
    "shard missing": (lambda f: write_index(f, {"a": "model-00002-of-00002.safetensors"}), "00002-of-00002"),
    "index without map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "tensor missing": (
        lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")),  # type: ignore[arg-type,return-value]
        r"lack model\.norm\.weight",
    ),
    "tensor too many": (lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(2))), "unexpected extra"),
    "other shape": (
        lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.zeros(3)})),
        r"other shapes .* model\.norm\.weight",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folder_is_refused_by_name_and_path(folder: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(ModelLoadError, match=message) as refused:
        load(folder)
    assert str(folder) in refused.value.message


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        check_model_files(str(tmp_path / "absent"))


def test_settings_that_cannot_work_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        load(folder, dtype="int8")
    with pytest.raises(ConfigError, match=r"model\.max_context"):
        load(folder, max_context=100_000)
    with pytest.raises(ConfigError, match=r"engine\.kv_cache"):
        count_blocks(load(folder), 1000, 64)
    with pytest.raises(ConfigError, match="not enough memory"):
        check_memory(ModelFiles(folder, "LlamaForCausalLM", (), 10**9), 4, 1 << 30, 4 << 30)
    model = ModelConfig(path=str(folder), name="m")
    with pytest.raises(ConfigError, match=r"engine\.device"):
        build_torch_engine(model, TorchEngineConfig(device="cuda"), 64, lambda spec: None)
    with pytest.raises(ConfigError, match=r"engine\.block_size"):
        build_torch_engine(model, TorchEngineConfig(block_size=48), 64, lambda spec: None)


def test_other_weights_dtype_chunk_or_block_are_other_kv_and_named(folder: Path, tmp_path: Path) -> None:
    other = make_tiny_model("llama", tmp_path / "other", seed=1)
    loaded = load(folder)
    spec = build_kv_spec(loaded, "m", 64, digest_cache=None)
    coarse = load_model(ModelConfig(path=str(folder), name="m"), TorchEngineConfig(block_size=32))
    for cause, unlike in {
        "weights": build_kv_spec(load(other), "m", 64, digest_cache=None),
        "model.dtype": build_kv_spec(load(folder, dtype="bfloat16"), "m", 64, digest_cache=None),
        "kv.chunk_tokens": build_kv_spec(loaded, "m", 128, digest_cache=None),
        "tiers.codec": build_kv_spec(loaded, "m", 64, (("tiers.codec", "int8.v1"),), digest_cache=None),
        "engine.block_size": build_kv_spec(coarse, "m", 64, digest_cache=None),
    }.items():
        assert list(differing_parts(spec, unlike)) == [cause]
        assert unlike.fingerprint != spec.fingerprint
    copy = make_tiny_model("llama", tmp_path / "copy")
    assert build_kv_spec(load(copy), "m", 64, digest_cache=None) == spec


def test_rope_and_window_are_part_of_the_attention_text() -> None:
    base = {"rope_parameters": {"rope_theta": 1e4}, "sliding_window": None, "transformers_version": "5"}
    assert attention_text(base) == attention_text({**base, "transformers_version": "6"})
    assert attention_text(base) != attention_text({**base, "rope_parameters": {"rope_theta": 1e5}})
    assert attention_text(base) != attention_text({**base, "sliding_window": 64})


def test_digest_cache_is_used_survives_damage_and_notices_a_changed_file(tmp_path: Path) -> None:
    weights, cache = tmp_path / "w.safetensors", tmp_path / "cache" / "digests.json"
    weights.write_bytes(b"one")
    first = weights_digest([weights], cache)
    cached = cache.read_bytes()
    assert weights_digest([weights], cache) == first
    cache.write_bytes(cached.replace(b'"sha256":"', b'"sha256":"x'))  # what is cached is what is used
    assert weights_digest([weights], cache) != first
    cache.write_bytes(b"\xff{")
    assert weights_digest([weights], cache) == first
    weights.write_bytes(b"two")
    os.utime(weights, ns=(1, 1))
    assert weights_digest([weights], cache) != first


def test_weights_written_over_by_a_copy_that_keeps_size_and_times_are_digested_anew(tmp_path: Path) -> None:
    weights, cache = tmp_path / "w.safetensors", tmp_path / "digests.json"
    weights.write_bytes(b"one")
    os.utime(weights, ns=(1, 1))
    first = weights_digest([weights], cache)
    weights.write_bytes(b"two")
    os.utime(weights, ns=(1, 1))
    assert weights_digest([weights], cache) != first


def test_weights_written_while_they_are_read_are_refused_and_not_remembered(tmp_path: Path, monkeypatch) -> None:
    weights, cache = tmp_path / "w.safetensors", tmp_path / "digests.json"
    weights.write_bytes(b"one")

    def digest_of_what_is_overtaken(file: Path) -> str:
        file.write_bytes(b"three")
        return "0" * 64

    monkeypatch.setattr("engines.provenance.file_digest", digest_of_what_is_overtaken)
    with pytest.raises(ModelLoadError, match=r"w\.safetensors was written while the model was being loaded"):
        weights_digest([weights], cache)
    assert not cache.exists()


@pytest.mark.parametrize("how", ["written", "replaced", "removed"])
def test_files_that_changed_since_their_stamps_were_taken_are_named(tmp_path: Path, how: str) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(b"one")
    stamps = {file: FileStamp.of(file) for file in files}
    check_unchanged(stamps)
    if how == "written":
        files[1].write_bytes(b"three")
    elif how == "replaced":
        other = tmp_path / "new"
        other.write_bytes(b"two")
        other.replace(files[1])
    else:
        files[1].unlink()
    with pytest.raises(ModelLoadError, match=r"b\.safetensors"):
        check_unchanged(stamps)


def write_over(folder: Path) -> None:
    """Other weights, in place: the same file, as `cp` and `rsync --inplace` write it."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = bytes(len(data) - start)
    with file.open("r+b") as stream:
        stream.write(data)


def test_a_running_models_weights_are_its_own_whatever_is_written_over_the_files(folder: Path) -> None:
    loaded = load(folder)
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    write_over(folder)
    assert before and all(torch.equal(parameter, before[name]) for name, parameter in loaded.model.named_parameters())
    assert not torch.equal(load(folder).model.get_input_embeddings().weight, before["model.embed_tokens.weight"])


def test_tied_weights_stay_one_tensor(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight", None))
    model = load(folder).model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_kv_is_not_named_after_weights_that_came_after_the_load(folder: Path) -> None:
    loaded = load(folder)
    write_over(folder)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors was written while the model was being loaded"):
        build_kv_spec(loaded, "m", 16, digest_cache=None)
