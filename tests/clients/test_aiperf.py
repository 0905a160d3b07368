"""AIPerf: streamed chats under load, every one of them answered and measured."""

import json
from pathlib import Path

import pytest

from tests.clients.shown import run, shown


@pytest.mark.timeout(400)
def test_it_measures_streamed_chats(served: dict[str, str], tmp_path: Path) -> None:
    command = [*shown("aiperf", served), "--ui", "none", "--output-artifact-dir", str(tmp_path)]
    run(command, HF_HUB_OFFLINE="")  # else it takes a folder's path for a name at a hub
    found = json.loads(next(tmp_path.rglob("profile_export_aiperf.json")).read_text())
    assert found["request_count"]["avg"] == 6 and not found.get("error_summary")
    assert found["time_to_first_token"]["avg"] > 0 and found["output_token_count"]["avg"] >= 1
