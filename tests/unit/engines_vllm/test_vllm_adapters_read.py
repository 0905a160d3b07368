"""What is read of an adapter's folder, and the arguments that vLLM gets for it."""

import json
from pathlib import Path

import pytest

from engines import provenance
from engines.vllm import adapters
from engines.vllm.adapters import CONFIG, WEIGHTS, adapter_arguments, read_adapters
from kvcore.errors import ModelLoadError


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(adapters, "DIGEST_CACHE", tmp_path / "digests.json")


def write(folder: Path, config: object, weights: bytes = b"weights") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS[0]).write_bytes(weights)
    return folder


def identity(name: str, folder: Path) -> str:
    (read,) = read_adapters({name: str(folder)})
    return read.served.identity


def test_the_identity_is_of_name_and_files_wherever_they_lie(tmp_path):
    one = write(tmp_path / "one", {"r": 8})
    assert identity("a", one) == identity("a", write(tmp_path / "copy", {"r": 8}))
    others = {identity("b", one), identity("a", write(tmp_path / "two", {"r": 8, "lora_alpha": 9}))}
    others.add(identity("a", write(tmp_path / "three", {"r": 8}, b"other")))
    assert len(others | {identity("a", one)}) == 4
    write(one, {"r": 8}, b"changed")
    assert identity("a", one) not in others


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "gives no rank `r`"),
        ({"r": "8"}, "gives no rank `r`"),
        ({"r": 8, "rank_pattern": {"q_proj": 0}}, "gives no rank `r`"),
        ([], "corrupt"),
    ],
)
def test_what_is_no_adapter_is_named(tmp_path, config, message):
    with pytest.raises(ModelLoadError, match=rf"model\.adapters\.sql: .*{message}"):
        read_adapters({"sql": str(write(tmp_path / "x", config))})


def test_a_folder_that_lacks_something_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"model\.adapters\.sql: the model folder does not exist"):
        read_adapters({"sql": str(tmp_path / "gone")})
    for missing in (CONFIG, WEIGHTS[0]):
        folder = write(tmp_path / "x", {"r": 8})
        (folder / missing).unlink()
        with pytest.raises(ModelLoadError, match=r"model\.adapters\.sql: .* no LoRA adapter in PEFT's format"):
            read_adapters({"sql": str(folder)})


def test_what_is_written_after_it_was_read_is_told(tmp_path):
    (read,) = read_adapters({"a": str(write(tmp_path / "a", {"r": 8}))})
    provenance.check_unchanged(read.stamps)
    (tmp_path / "a" / WEIGHTS[0]).write_bytes(b"something else")
    with pytest.raises(ModelLoadError, match=WEIGHTS[0]):
        provenance.check_unchanged(read.stamps)


def test_arguments_have_room_for_the_highest_rank_and_for_all_in_main_memory(tmp_path):
    paths = {f"a{rank}": str(write(tmp_path / f"a{rank}", {"r": rank})) for rank in (4, 9)}
    read = read_adapters(paths | {"p": str(write(tmp_path / "p", {"r": 4, "rank_pattern": {"q": 17}}))})
    words = ["--enable-lora", "--max-lora-rank", "32", "--max-loras", "3", "--max-cpu-loras", "3"]
    assert list(adapter_arguments({}, read)) == words
    given = {"max_lora_rank": 64, "max-loras": 4}
    assert list(adapter_arguments(given, read)) == ["--enable-lora", "--max-cpu-loras", "4"]
    assert list(adapter_arguments({"max-loras": 1}, read)) == [*words[:3], "--max-cpu-loras", "3"]
    assert list(adapter_arguments({}, ())) == []
