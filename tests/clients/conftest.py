"""Clients as their users run them, at their newest versions, against real servers: `make clients`.

They live in environments of their own, as what they pin is not what kvferry pins, and kvferry is in none of them: what
they talk to is a process of kvferry's environment (`support.client_servers`). A client that is not installed is passed
over.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = {
    "test_openai.py": "openai",
    "test_anthropic.py": "anthropic",
    "test_litellm.py": "litellm",
    "test_langchain.py": "langchain-openai",
    "test_llama_index.py": "llama-index-llms-openai-like",
    "test_instructor.py": "instructor",
    "test_snippets.py": "litellm",
    "test_aiperf.py": "aiperf",
    "test_lm_eval.py": "lm_eval",
    "test_guidellm.py": "guidellm",
    "test_vllm_bench.py": "vllm",
}


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


collect_ignore = [file for file, distribution in NEEDED.items() if not is_installed(distribution)]

if len(collect_ignore) < len(NEEDED):  # else imports of theirs wait for servers on the internet
    os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "HF_HUB_OFFLINE": "1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here; the hook is called with the tests of all folders."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses by name: `torch`, `tools`, `late`, `dead`; and `model`, a folder. See support.client_servers."""
    python = os.environ.get("KVFERRY_PYTHON", str(ROOT / ".venv/bin/python"))
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "support.client_servers", str(tmp_path_factory.mktemp("clients"))]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    lines = iter(process.stdout.readline, "")
    said = next((line for line in lines if line.startswith("SERVED ")), None)
    assert said is not None, f"{command} ended with {process.wait()}"
    reader = Thread(target=lambda: [sys.stdout.write(line) for line in lines])
    reader.start()
    yield json.loads(said.removeprefix("SERVED "))
    process.stdin.close()
    assert process.wait(60) == 0
    reader.join()


@pytest.fixture
def torch_url(served: dict[str, str]) -> str:
    """Of the cluster on the demo model, `demo`."""
    return f"{served['torch']}/v1"


@pytest.fixture
def tools_url(served: dict[str, str]) -> str:
    """Of a router whose model, `fake-model`, asks for the weather in Zürich and Rome, and then answers."""
    return f"{served['tools']}/v1"
