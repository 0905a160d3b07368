"""`vllm bench serve`: completions and chats under load, every one of them answered and measured."""

import json
from pathlib import Path

import pytest

from tests.clients.shown import run, shown


@pytest.mark.timeout(400)
@pytest.mark.parametrize("chats", [True, False])
def test_it_measures(served: dict[str, str], tmp_path: Path, chats: bool) -> None:
    command = [
        *shown("vllm", served),
        "--save-result",
        "--result-dir",
        str(tmp_path),
        "--result-filename",
        "found.json",
    ]
    if not chats:
        command += ["--backend", "openai", "--endpoint", "/v1/completions"]
    run(command)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["completed"], found["failed"]) == (4, 0)
    assert found["total_output_tokens"] > 0 and found["mean_ttft_ms"] > 0
