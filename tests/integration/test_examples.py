"""The programs in `examples/` run as their first lines say, against a real cluster with the simulated engine."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
from support.cluster import cluster

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


async def run(example: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "examples" / example),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    return output.decode()


def test_each_example_says_how_it_is_run():
    for path in EXAMPLES:
        assert f"Run: python examples/{path.name}" in path.read_text(), path
    assert [path.name for path in EXAMPLES] == ["ask.py", "reuse.py"], "a new example needs a test below"


@pytest.mark.slow
async def test_the_examples_run(tmp_path: Path):
    async with cluster(tmp_path, prefillers=1, decoders=1) as subject:
        answer = await run("ask.py", "--url", subject.url, "--max-tokens", "8", "What is a ferry?")
        assert re.search(r"prefiller \S+, decoder decode-0, because: \w+", answer), answer
        assert "first token after" in answer
        reuse = await run("reuse.py", "--url", subject.url)
        cached = [int(count) for count in re.findall(r"(\d+) from the cache", reuse)]
        assert len(cached) == 2 and cached[0] == 0 and cached[1] > 500, reuse
