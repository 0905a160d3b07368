"""A cluster file that is read again: what is taken over, what is named, and what a bad one does."""

import logging
from functools import partial
from pathlib import Path

import pytest

from kvcore.config.file import load_config
from kvcore.config.live.file import LiveFile
from kvcore.config.live.settings import node_settings, node_settings_name, router_settings
from kvcore.config.schema import ClusterConfig

FILE = """
cluster: c
model: {path: sim, name: sim}
engine: {kind: sim, max_sequences: 64}
router: {policy: prefix_aware, max_waiting: 10, first_token_s: 30}
nodes: {d0: {role: decoder, port: 2}}
service: {log_level: info}
"""


class Rig:
    """A file on the disk, and what a process that goes by it was told."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "c.yaml"
        self.path.write_text(FILE)
        self.file = LiveFile(self.path, ["router.port=8123"], load_config(self.path, ["router.port=8123"]))
        self.told: list[ClusterConfig] = []

    def write(self, *changes: tuple[str, str]) -> None:
        text = FILE
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        self.path.write_text(text)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records if record.name == "kvcore.config"]
    caplog.clear()
    return said


async def test_what_can_change_is_taken_over_and_the_rest_is_named(rig: Rig, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    rig.file.goes_by(router_settings)
    rig.file.take(["router.max_waiting", "router.first_token_s"], rig.told.append)
    rig.write(("max_waiting: 10", "max_waiting: 20"), ("first_token_s: 30", "first_token_s: null"))
    await rig.file.read_again()
    (new,) = rig.told  # once, though two of its settings have changed
    assert (new.router.max_waiting, new.router.first_token_s, new.router.port) == (20, None, 8123)
    (said,) = lines(caplog)
    assert "router.first_token_s: 30.0 -> not set; router.max_waiting: 10 -> 20" in said
    rig.write(
        ("max_waiting: 10", "max_waiting: 20"), ("cluster: c", "cluster: d"), ("max_sequences: 64", "max_sequences: 8")
    )
    await rig.file.read_again()
    changed, left = lines(caplog)
    assert "router.first_token_s: not set -> 30.0" in changed and len(rig.told) == 2
    assert left.startswith("restart_needed") and 'cluster: \\"c\\" -> \\"d\\"' in left and "max_sequences" not in left
    await rig.file.read_again()
    changed, left = lines(caplog)
    assert "changed=nothing" in changed and "cluster" in left and len(rig.told) == 2


@pytest.mark.parametrize("bad", ["nonsense: [", FILE.replace("port: 2", "port: 99999"), ""])
async def test_a_bad_file_changes_nothing_and_is_said(rig: Rig, caplog: pytest.LogCaptureFixture, bad: str):
    rig.file.take(["router.max_waiting"], rig.told.append)
    before = dict(rig.file.settings)
    rig.path.write_text(bad)
    await rig.file.read_again()
    (said,) = lines(caplog)
    assert said.startswith("reload_failed") and "nothing changes" in said and str(rig.path) in said
    assert not rig.told and rig.file.settings == before
    rig.path.unlink()
    await rig.file.read_again()
    assert "no such file" in lines(caplog)[0]


async def test_a_node_tells_the_name_of_what_it_goes_by_now(rig: Rig):
    rig.file.goes_by(partial(node_settings, name="d0"))
    assert rig.file.name == node_settings_name(load_config(rig.path), "d0")
    rig.file.take(["service.log_level"], rig.told.append)
    rig.write(("log_level: info", "log_level: debug"), ("max_sequences: 64", "max_sequences: 8"))
    await rig.file.read_again()
    changed_alone = load_config(rig.path, ["engine.max_sequences=64"])
    assert rig.file.name == node_settings_name(changed_alone, "d0") and len(rig.told) == 1
