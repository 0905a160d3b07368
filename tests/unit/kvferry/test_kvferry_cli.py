"""The first contact: what `kvferry` says without a command, which version it is, which cluster file is meant."""

from importlib.metadata import version
from pathlib import Path

import pytest

from kvcore.config.file import load_config
from kvferry.cli import DEFAULT_CONFIG, cluster_file, main

CONFIGS = Path(__file__).parents[3] / "configs"


def test_without_a_command_its_help_is_printed(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: kvferry") and all(word in out for word in ("up", "serve", "doctor", "demo"))


def test_the_version_is_the_installed_one(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"kvferry {version('kvferry')}\n"


def test_the_examples_are_found_without_the_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in CONFIGS.glob("*.yaml"):
        found = cluster_file(f"configs/{file.name}")
        assert found.is_file() and load_config(found).cluster == load_config(file).cluster
    assert cluster_file("configs/nosuch.yaml") == Path("configs/nosuch.yaml")
    assert cluster_file("laptop.yaml") == Path("laptop.yaml"), "only what looks like README's path is an example"


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / DEFAULT_CONFIG
    own.parent.mkdir()
    own.write_text("cluster: mine")
    assert cluster_file(str(DEFAULT_CONFIG)) == DEFAULT_CONFIG
