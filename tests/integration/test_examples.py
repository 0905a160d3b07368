"""The programs in `examples/` run as their first lines say, against a real cluster with the simulated engine."""

import asyncio
import re
import runpy
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

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


class StandsStill(BaseHTTPRequestHandler):
    """Streams two events, and comments around them."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        events = (b": no node is up", b'data: {"n": 1}', b": nothing new yet", b'data: {"n": 2}', b"data: [DONE]")
        self.wfile.write(b"\n\n".join((*events, b"")))

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_answer_that_stands_still_is_read_to_its_end():
    with HTTPServer(("127.0.0.1", 0), StandsStill) as server:
        serving = Thread(target=server.handle_request)
        serving.start()
        stream = runpy.run_path(str(ROOT / "examples" / "ask.py"))["stream"]
        assert list(stream(f"http://127.0.0.1:{server.server_port}", {}, "one")) == [{"n": 1}, {"n": 2}]
        serving.join()


@pytest.mark.slow
async def test_the_examples_run(tmp_path: Path):
    async with cluster(tmp_path, prefillers=1, decoders=1) as subject:
        answer = await run("ask.py", "--url", subject.url, "--max-tokens", "8", "What is a ferry?")
        assert re.search(r"prefiller \S+, decoder decode-0, because: \w+", answer), answer
        assert "first token after" in answer
        reuse = await run("reuse.py", "--url", subject.url)
        cached = [int(count) for count in re.findall(r"(\d+) from the cache", reuse)]
        assert len(cached) == 2 and cached[0] == 0 and cached[1] > 500, reuse
