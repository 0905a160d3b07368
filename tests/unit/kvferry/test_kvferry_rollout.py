"""`kvferry rollout`, step by step, over a fake router and a fake restarter: what is done, and how it stops."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from kvcore.config.file import load_config
from kvcore.config.live.settings import node_settings_name
from kvcore.errors import ConfigError
from kvcore.trust.opening import OPEN
from kvferry.cache.client import CacheCommandError
from kvferry.cli import main
from kvferry.doctor.findings import Context
from kvferry.launch.control import LauncherReply, revision_file
from kvferry.launch.processes import plan_processes
from kvferry.rollout import command as command_module
from kvferry.rollout import steps as steps_module
from kvferry.rollout.check import check_rollout
from kvferry.rollout.command import RolloutCommand, RolloutOptions
from kvferry.rollout.limits import RolloutLimits
from kvferry.rollout.record import RecordFile, only_record, unfinished
from kvferry.rollout.restarting import ByCommand, ByHand, FileGiven, RestartFailedError
from router.admin.reports import NodeOrdered, NodeRow, NodesReport, NodeTried

FILE = """
cluster: c
model: {path: sim, name: sim}
engine: {kind: sim, max_sequences: SEQUENCES}
nodes: {p0: {role: prefiller, port: 1}, d0: {role: decoder, port: 2}}
"""


class FakeCluster:
    """Nodes behind a router, and who starts them anew. `file`: by which they are started; `broken`: nodes that do not
    come up; `mute`: that make no token; `away`: the router answers nothing."""

    waits = True

    def __init__(self, old: Path) -> None:
        config = load_config(old)
        self.config, self.broken, self.mute, self.away = config, set[str](), set[str](), False
        self.drained, self.starts, self.done = set[str](), dict.fromkeys(config.nodes, 1), list[str]()
        self.settings = {name: node_settings_name(config, name) for name in config.nodes}
        self.on_restart = asyncio.Event()

    async def get(self, path: str, _: object) -> Any:
        assert path == "/v1/nodes"
        if self.away:
            raise CacheCommandError("the router is not there")
        return NodesReport(nodes=[self._row(name) for name in self.config.nodes])

    async def post(self, path: str, body: Any, _: object) -> Any:
        what = path.rsplit("/", 1)[1]
        self.done.append(f"{what} {body.node}")
        if what == "try":
            return NodeTried(problem="it made no token" if body.node in self.mute else "")
        (self.drained.add if what == "drain" else self.drained.discard)(body.node)
        return NodeOrdered(node=self._row(body.node))

    def _row(self, name: str) -> NodeRow:
        up = name not in self.broken or self.starts[name] == 1
        state = "lost" if not up else "drained" if name in self.drained else "ready"
        role = self.config.nodes[name].role.value
        return NodeRow(
            id=name, role=role, state=state, incarnation=self.starts[name], serves=up, settings=self.settings[name]
        )

    async def restart(self, name: str) -> None:
        self.done.append(f"restart {name}")
        if name in self.starts:
            self.starts[name] += 1
            self.settings[name] = node_settings_name(self.config, name)
        self.on_restart.set()

    async def is_up(self, name: str) -> bool | None:
        return None

    async def why_not(self, name: str) -> str:
        return f"{name} says that it has no memory"


class Rig:
    """Files and a fake of what runs by the first of them."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        self.old, self.new = tmp_path / "old.yaml", tmp_path / "new.yaml"
        for file, sequences in ((self.old, "64"), (self.new, "8")):
            file.write_text(FILE.replace("SEQUENCES", sequences))
        self.cluster, self.out = FakeCluster(self.old), io.StringIO()

        @asynccontextmanager
        async def calls(*_: object, **__: object) -> AsyncIterator[FakeCluster]:
            yield self.cluster

        async def not_launched(_: str) -> LauncherReply | None:
            return None

        monkeypatch.setattr(command_module, "router_calls", calls)
        monkeypatch.setattr(command_module, "_launched", not_launched)
        monkeypatch.setattr(command_module, "ByCommand", lambda *_: self.cluster)
        monkeypatch.setattr(steps_module, "release", lambda: "")
        monkeypatch.setattr(command_module, "release", lambda: "")

    async def roll(self, file: Path, **how: Any) -> int:
        self.cluster.config, self.cluster.done = load_config(file), []
        limits = RolloutLimits(drain_s=1.0, start_s=0.05, poll_s=0.001, trials=2)
        running = how.pop("running", self.old)
        options = RolloutOptions(file, (), running, "http://r", OPEN, limits, restart="x", **how)
        return await RolloutCommand(options, Console(file=self.out, width=200)).roll()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


async def test_each_node_is_drained_started_tried_and_used_again_before_the_next(rig: Rig):
    assert await rig.roll(rig.new) == 0
    assert rig.cluster.done == [
        f"{what} {name}" for name in ("p0", "d0") for what in ("drain", "restart", "try", "undrain")
    ]
    assert not unfinished("c") and not rig.cluster.drained and not check_rollout(Context(rig.cluster.config))
    assert await rig.roll(rig.old, running=None, back=True) == 0
    assert len(rig.cluster.done) == 8 and RecordFile("c").read() is None


async def test_the_first_that_does_not_come_up_ends_it_drained_and_named_and_the_next_run_goes_on(rig: Rig, capsys):
    rig.cluster.broken = {"d0"}
    assert await rig.roll(rig.new) == 1
    said = capsys.readouterr().err
    assert "d0 did not come up in 0.05 s" in said and "d0 says that it has no memory" in said
    assert "drained by this rollout, and not used until it goes on: d0" in said
    assert rig.cluster.drained == {"d0"} and "drained and not used: d0" in unfinished("c")
    (finding,) = check_rollout(Context(rig.cluster.config))
    assert not finding.ok and "d0 did not come up" in finding.detail and "--back" in finding.remedy
    words = ["status", "--config", str(rig.new), "--router", "http://127.0.0.1:1"]
    assert await asyncio.to_thread(main, words) == 1
    assert "drained and not used: d0" in capsys.readouterr().out
    assert rig.cluster.done[-2:] == ["drain d0", "restart d0"]
    rig.cluster.broken = set()
    assert await rig.roll(rig.new) == 0
    assert rig.cluster.done == ["try d0", "undrain d0"] and not rig.cluster.drained
    assert "not finished; this goes on" in rig.out.getvalue()


async def test_a_node_that_makes_no_token_is_not_used_and_the_way_back_mends_it(rig: Rig, capsys):
    rig.cluster.mute = {"p0"}
    assert await rig.roll(rig.new) == 1
    assert "made no token when it was tried out" in capsys.readouterr().err
    assert rig.cluster.done == ["drain p0", "restart p0", "try p0", "try p0"] and rig.cluster.drained == {"p0"}
    rig.cluster.mute = set()
    assert only_record().before == str(revision_file("c", load_config(rig.old)))
    assert await rig.roll(Path(only_record().before), back=True) == 0
    assert rig.cluster.done == ["restart p0", "try p0", "undrain p0"] and not unfinished("c")


async def test_one_that_is_interrupted_says_what_it_has_left_and_goes_on(rig: Rig, capsys):
    rig.cluster.broken = {"p0"}
    task = asyncio.create_task(rig.roll(rig.new))
    await rig.cluster.on_restart.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "not used until it goes on: p0" in capsys.readouterr().err and "interrupted" in unfinished("c")
    rig.cluster.broken = set()
    assert await rig.roll(rig.new) == 0
    assert rig.cluster.done[:2] == ["try p0", "undrain p0"]


async def test_what_changes_is_said_first_and_a_dry_run_does_nothing(rig: Rig):
    assert await rig.roll(rig.new, dry_run=True) == 0
    assert not rig.cluster.done and RecordFile("c").read() is None
    assert rig.out.getvalue().splitlines() == [f"{name}: engine.max_sequences: 64 -> 8" for name in ("p0", "d0")]


async def test_what_cannot_be_rolled_is_named_and_nothing_is_done(rig: Rig):
    rig.new.write_text(rig.new.read_text().replace("port: 1", "port: 9"))
    with pytest.raises(ConfigError, match=r"nodes.p0.port: the others find it there"):
        await rig.roll(rig.new)
    assert not rig.cluster.done
    with pytest.raises(ConfigError, match="--config says by which file"):
        await rig.roll(rig.old, running=None)
    with RecordFile("c").alone(), pytest.raises(ConfigError, match="under way"):
        await rig.roll(rig.old)


async def test_two_at_a_time_but_one_and_all_though_nothing_changes(rig: Rig):
    assert await rig.roll(rig.old, at_once=2, again=True, running=rig.old) == 0
    assert rig.cluster.done[:2] == ["restart metadata-server", "restart router"]
    assert rig.cluster.done[5:8] == ["undrain p0", "drain d0", "restart d0"]  # never all that can take requests
    assert rig.cluster.starts == {"p0": 2, "d0": 2}
    assert msgspec.json.decode(RecordFile("c").path.read_bytes())["finished"]


async def test_a_command_of_ones_own_starts_a_process_anew_and_one_that_fails_is_said(rig: Rig, tmp_path: Path):
    said: list[str] = []
    config = load_config(rig.new)
    plans = {plan.name: plan for plan in plan_processes(config, rig.new)}
    given = FileGiven(config, rig.new, (), revision_file("c", config))
    limits = RolloutLimits(drain_s=1.0, start_s=1.0)
    command = f"echo restarted {{node}} on {{host}}; cp {{file}} {tmp_path}/{{node}}.yaml; test {{node}} = p0"
    by_command = ByCommand(command, given, plans, said.append, limits)
    await by_command.restart("p0")
    assert said[-1] == "  | restarted p0 on 127.0.0.1" and load_config(tmp_path / "p0.yaml") == config
    rig.new.write_text("nonsense")  # what was planned is what is rolled out
    with pytest.raises(RestartFailedError, match="to restart d0 ended with 1"):
        await by_command.restart("d0")
    assert load_config(tmp_path / "d0.yaml") == config


async def test_a_person_is_told_what_to_start_where(rig: Rig):
    said: list[str] = []
    plans = {plan.name: plan for plan in plan_processes(load_config(rig.new), rig.new)}
    await ByHand(plans, said.append).restart("d0")
    assert said == [
        f"d0: stop it now on 127.0.0.1 (SIGTERM), and start it: python -P -m decoder --config {rig.new} --node d0"
    ]


def test_a_user_without_a_home_has_no_rollouts_and_a_record_that_is_damaged_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", "~nobody-at-all/state")
    assert unfinished("c") == ""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    RecordFile("c").path.parent.mkdir(parents=True)
    RecordFile("c").path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        unfinished("c")


def test_status_shows_the_cluster_beside_a_rollouts_record_that_is_damaged(capsys, monkeypatch, rig: Rig):
    monkeypatch.setattr("kvferry.status.run_status", _shown)
    RecordFile("c").path.parent.mkdir(parents=True)
    RecordFile("c").path.write_text("{")
    assert main(["status", "--config", str(rig.new)]) == 0
    out = capsys.readouterr().out
    assert "problem: " in out and "rollout.json: cannot be read" in out and "remove the file" in out


async def _shown(*_args: object, **_more: object) -> int:
    return 0


def test_without_a_file_and_without_a_rollout_there_is_no_way(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["rollout"]) == main(["rollout", "--back"]) == 2
    err = capsys.readouterr().err
    assert "give the cluster file" in err and "rollouts were begun here of none" in err
