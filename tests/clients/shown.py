"""The commands of load generators as docs/clients.md shows them, with the addresses and folders of a test."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs/clients.md").read_text()


def shown(program: str, served: Mapping[str, str]) -> list[str]:
    """The words of the one that begins so."""
    block = re.findall(r"```bash\n(.*?)```", PAGE, re.S)[-1].replace("\\\n", " ")
    (line,) = [line for line in block.splitlines() if line.startswith(f"{program} ")]
    line = line.replace("http://localhost:8000", served["torch"]).replace("FOLDER", served["model"])
    name, *words = shlex.split(line)
    return [str(Path(sys.executable).parent / name), *words]


def run(command: Sequence[str], **environment: str) -> None:
    """To its end, which must be good."""
    whole = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=whole)
    assert done.returncode == 0, done.stdout + done.stderr
