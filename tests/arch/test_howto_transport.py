"""docs/how-to/transport.md is followed to the letter, in a copy of the tree: its transport passes the suite."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/how-to/transport.md").read_text()
SUITES = ["tests/conformance/test_transfer_conformance.py", "tests/conformance/test_transfer_faults.py"]
_BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```", re.M | re.S)


def edited_file(before: str) -> str:
    """The file that the page names last before a block."""
    return re.findall(r"`((?:transfer|kvcore|tests)/[a-z_/]+\.py)`", before)[-1]


def apply(text: str, diff: str) -> str:
    """The text with the one place that the diff shows changed: a line is kept, taken out (-) or put in (+)."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(old) == 1, f"the page shows what is not in the file:\n{old}"
    return text.replace(old, new)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the suite needs of the repository, with the page's steps done."""
    for folder in ("kvcore", "transfer", "tests/support", "tests/conformance"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    written = []
    for block in _BLOCK.finditer(PAGE):
        path = tmp_path / edited_file(PAGE[: block.start()]) if block[1] == "diff" else tmp_path / "transfer/pread.py"
        path.write_text(apply(path.read_text(), block[2]) if block[1] == "diff" else block[2])
        written.append(str(path.relative_to(tmp_path)))
    assert written == [
        "transfer/pread.py",
        "kvcore/config/schema.py",
        "transfer/select.py",
        "transfer/select.py",
        "tests/support/transfer_rigs.py",
    ]
    return tmp_path


def run(tree: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=tree, env=env, capture_output=True, text=True, timeout=100
    )


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "least"), [(SUITES[0], 30), (SUITES[1], 5)])
def test_the_pages_transport_passes_the_suites(tree: Path, suite: str, least: int) -> None:
    done = run(tree, "pytest", "-q", "-k", "pread", suite)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= least


@pytest.mark.slow
def test_the_pages_code_keeps_the_house_rules(tree: Path) -> None:
    checks = [("ruff", "check", "transfer"), ("ruff", "format", "--check", "transfer"), ("mypy", "transfer/pread.py")]
    for done in (run(tree, *check) for check in checks):
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_pages_steps_still_fit_the_files_that_they_change(tree: Path) -> None:
    assert "PreadTransfer" in (tree / "transfer/select.py").read_text()


def test_the_page_is_narrow_enough_to_read() -> None:
    assert max(map(len, PAGE.splitlines())) < 160
