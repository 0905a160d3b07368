"""These tests run in vLLM's environment (`make vllm`). Elsewhere this folder is passed over."""

import importlib.metadata
from pathlib import Path

import pytest

try:
    importlib.metadata.version("vllm")  # not find_spec: this folder itself would do as a package of that name
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here; the hook is called with the tests of all folders."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
