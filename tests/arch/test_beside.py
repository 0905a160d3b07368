"""scripts/beside.sh: `make test` fails where either of its two halves does, and leaves nothing running."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "beside.sh"


@pytest.mark.parametrize(
    "patient, command, status", [("true", "true", 0), ("exit 3", "true", 3), ("true", "exit 4", 4)]
)
def test_it_fails_where_either_does_and_shows_what_the_patient_one_said(
    patient: str, command: str, status: int
) -> None:
    done = subprocess.run(
        [SCRIPT, f"A='so it is' bash -c 'echo $A'; {patient}", command], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (status, "so it is\n")


def test_ended_early_it_ends_the_patient_one_and_what_that_has_started(tmp_path: Path) -> None:
    os.mkfifo(held := tmp_path / "held")
    patient = f"exec 3>{held}; sleep 600 & sleep 600"
    command = [str(SCRIPT), patient, f"echo begun; cat {held}"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as script, held.open() as end:
        assert script.stdout is not None
        assert script.stdout.readline() == b"begun\n"  # earlier the signal might come before what it is to end
        os.killpg(script.pid, signal.SIGTERM)
        assert script.wait(60) == 130
        assert end.read() == "", "nobody has it open for writing any more"
