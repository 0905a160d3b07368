"""The image's Dockerfile keeps the rules of hadolint."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = Path(sys.executable).parent / "hadolint"


def findings(dockerfile: str) -> str:
    run = subprocess.run([HADOLINT, "--no-color", "-"], input=dockerfile, capture_output=True, text=True)
    assert not run.stderr, run.stderr
    return run.stdout


def test_hadolint_finds_nothing_in_it():
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    assert findings(dockerfile) == ""
    assert "DL3002" in findings(dockerfile.replace("USER 10001:10001", "USER root"))
