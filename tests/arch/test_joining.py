"""What CONTRIBUTING, SECURITY and tests/README say is so, and CONTRIBUTING's commands run."""

import asyncio
import os
import re
import shlex
import signal
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from support.ports import free_ports

import kvferry
from kvcore.config.file import load_config
from scripts.write_tests_map import helpers_table

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = dict(re.findall(r"<!-- runs: (\w+) -->\n```bash\n(.*?)```", TEXT, re.S))


async def output_of(command: str) -> str:
    program, *arguments = shlex.split(command, comments=True)
    assert program == "python"
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    return output.decode()


def test_every_block_says_how_it_is_run():
    assert len(BLOCKS) == TEXT.count("```bash") == 2


@pytest.mark.slow
async def test_one_file_one_test_and_one_seed_run_as_the_page_says():
    activate, *commands = BLOCKS["shell"].splitlines()
    assert activate == "source .venv/bin/activate"
    whole, one, seed = [await output_of(command) for command in commands]
    assert " passed" in whole and " passed" in one and "deselected" in one
    assert "no problem" in seed and len(seed.splitlines()) > 50


async def test_a_process_serves_under_the_debugger(tmp_path: Path):
    program, *arguments = shlex.split(BLOCKS["debugger"])
    config = yaml.safe_load((ROOT / arguments[-1]).read_text())
    (port,) = free_ports(1)
    config["metadata_server"]["port"] = port
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments[:-1], str(tmp_path / "cluster.yaml")),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        assert program == "python" and process.stdout is not None
        async with asyncio.timeout(30):
            while b"ready" not in (line := await process.stdout.readline()):
                assert line, "it has ended"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()


def test_the_helpers_are_listed_as_they_describe_themselves():
    """`python scripts/write_tests_map.py` writes the table."""
    page = (ROOT / "tests" / "README.md").read_text()
    assert page.partition("## Helpers")[2] == helpers_table().partition("## Helpers")[2]
    for name in re.findall(r"`(\w+)\.\w+`|`(\w+_\w+)`", page.partition("## Helpers")[0].partition("Where to begin")[2]):
        assert (ROOT / "tests" / "support" / f"{name[0] or name[1]}.py").exists(), name
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        *re.findall(r"^\| `(\w+)` \|", page.partition("Where to begin")[0], re.M),
        "support",
    }


def test_the_version_is_the_same_wherever_it_is_written():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == kvferry.__version__


def test_listeners_bind_loopback_unless_the_file_says_otherwise(tmp_path: Path):
    """SECURITY.md says so."""
    file = tmp_path / "cluster.yaml"
    text = "cluster: c\nmodel: {path: sim, name: sim}\nengine: {kind: sim}\n"
    file.write_text(text + "nodes: {d: {role: decoder, port: 8200, segment: 1MiB}}\n")
    config = load_config(file)
    assert {config.router.host, config.metadata_server.host, config.nodes["d"].host} == {"127.0.0.1"}
