"""What docs/clients.md shows of each client runs as it stands, and says something."""

import importlib.metadata
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/clients.md").read_text()
SNIPPETS = dict(re.findall(r"<!-- client: (\w+) -->\n```python\n(.*?)```", PAGE, re.S))


def test_there_is_one_of_each() -> None:
    assert list(SNIPPETS) == ["litellm", "langchain", "llama_index", "instructor"]


def test_the_versions_are_those_that_are_installed() -> None:
    shown = re.findall(r"^\| .*`([a-z-]+)`\) \| ([0-9.]+) \|", PAGE, re.M)
    assert len(shown) == 8
    here = [(name, version) for name, version in shown if name not in ("aiperf", "guidellm")]
    assert here == [(name, importlib.metadata.version(name)) for name, _ in here]


@pytest.mark.parametrize("client", SNIPPETS)
def test_it_runs_as_it_stands(client: str, served: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    addresses = {"http://localhost:8000": served["torch"], "http://localhost:8001": served["dead"]}
    snippet = SNIPPETS[client]
    for shown, real in addresses.items():
        snippet = snippet.replace(shown, real)
    exec(compile(snippet, client, "exec"), {"__name__": client})
    assert capsys.readouterr().out.strip()
