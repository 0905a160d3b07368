"""README's commands run. Each block says how: `<!-- runs: make | up | client | rag | parse -->`."""

import asyncio
import json
import os
import re
import shlex
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import pytest

from kvcore.config.file import load_config
from kvferry.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:<!-- runs: (\w+) -->\n)?```bash\n(.*?)```", re.S)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text())
BIN = Path(sys.executable).parent


def commands(kind: str) -> list[str]:
    """Of all blocks of a kind, one command each; the environment is the test's own."""
    text = "".join(block for runs, block in BLOCKS if runs == kind).replace("\\\n", " ").replace(" && ", "\n")
    return [line for line in text.splitlines() if line and not line.startswith("source ")]


async def run(command: str, timeout_s: float) -> str:
    """Output of a command that must succeed."""
    process = await asyncio.create_subprocess_shell(
        f"unset MAKEFLAGS MAKELEVEL; export PATH={shlex.quote(str(BIN))}:$PATH; {command}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), timeout_s)
    assert process.returncode == 0, f"{command}\n{output.decode()}"
    return output.decode()


def test_every_block_says_how_it_is_run():
    assert len(BLOCKS) >= 4
    assert {runs for runs, _ in BLOCKS} == {"make", "up", "client", "rag", "parse"}


def test_commands_that_cannot_run_here_name_real_programs_targets_files_and_nodes():
    for line in commands("parse"):
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), line
            continue
        assert (BIN / program).exists(), program
        if program == "kvferry":
            parsed = build_parser().parse_args(arguments)
            assert arguments[0] != "up" or load_config(ROOT / parsed.config).nodes
            continue
        config = load_config(ROOT / arguments[arguments.index("--config") + 1])
        if "--node" in arguments:
            assert config.nodes[arguments[arguments.index("--node") + 1]].role == program


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_the_demo_runs_and_ends_with_its_result():
    (command,) = commands("make")
    output = await run(f"{command} ONCE=1 VENV={BIN.parent}", 280)
    last = output.strip().splitlines()[-1]
    assert last.startswith("RESULT "), output
    result = json.loads(last.removeprefix("RESULT "))
    assert result["second"]["cached_tokens"] > 1000
    assert result["first"]["ttft_s"] >= 3 * result["second"]["ttft_s"]
    assert result["moved_bytes"] > 0
    assert result["transport"] == "shm"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("bm25s") is None and not os.environ.get("CI"), reason="bm25s is not installed")
async def test_passages_of_a_folder_are_reused_from_question_to_question():
    (command,) = commands("rag")
    output = await run(command, 280)
    result = json.loads(output.strip().splitlines()[-1].removeprefix("RESULT "))
    first, second = result["answers"]
    assert second["approximate_tokens"] > 200
    assert second["approximate_tokens"] + second["cached_tokens"] > 0.8 * second["prompt_tokens"]
    assert second["ttft_s"] < first["ttft_s"]


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_a_cluster_comes_up_answers_and_ends_as_the_readme_says():
    *before, up = commands("up")
    for command in before:
        await run(command, 60)
    process = await asyncio.create_subprocess_exec(
        BIN / shlex.split(up)[0], *shlex.split(up)[1:], cwd=ROOT, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get("http://127.0.0.1:8000/health") as reply:
                        if reply.status == 200:
                            break
                except aiohttp.ClientError:
                    assert process.returncode is None, "kvferry up has ended"
                await asyncio.sleep(0.1)
        outputs = [await run(command, 60) for command in commands("client")]
    finally:
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    status, chat, stream, requests, metrics = outputs
    assert "decode-0" in status
    assert json.loads(chat)["choices"][0]["message"]["content"]
    assert stream.strip().endswith("data: [DONE]")
    assert "mine" in requests
    assert "kvferry_router_requests_total" in metrics
