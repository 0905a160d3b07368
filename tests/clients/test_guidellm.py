"""GuideLLM: streamed chats one after the other, every one of them answered and measured."""

import json
from pathlib import Path

import pytest

from tests.clients.shown import run, shown


@pytest.mark.timeout(400)
def test_it_measures_streamed_chats(served: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run([*shown("guidellm", served), "--disable-console", "--output", f"kind=json,path={report}"])
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (3, 0)
