"""A cluster that is brought to another file while clients ask, and back from one that is no good."""

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from support.cluster import ClusterHandle, cluster
from test_cluster_processes import neighbours

from engines.sim.reference import expected_tokens
from kvcore.config.file import load_config
from kvcore.config.live.settings import node_settings_name
from kvcore.config.schema import SimEngineConfig
from kvcore.trust.opening import OPEN
from kvferry.cache.client import router_calls
from kvferry.launch.control import controlled
from kvferry.nodes.commands import NodesCommands
from kvferry.nodes.role import RoleCommand
from kvferry.rollout.command import RolloutCommand, RolloutOptions
from kvferry.rollout.limits import RolloutLimits
from kvferry.rollout.record import RecordFile, unfinished
from nodeapi.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SOON_S = 60.0
SAMPLING = SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True)
FIELDS = {"max_tokens": 40, "seed": 1, "ignore_eos": True, "return_token_ids": True}


@asynccontextmanager
async def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> AsyncIterator[ClusterHandle]:
    """A cluster whose launcher takes orders, as that of `kvferry up`."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    async with AsyncExitStack() as stack:
        subject = await stack.enter_async_context(cluster(tmp_path, **how))
        await stack.enter_async_context(controlled(subject.launcher, subject.config.cluster))
        yield subject


def file_with(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """The cluster's file with other values at these paths."""
    content = yaml.safe_load((folder / "cluster.yaml").read_text())
    for path, value in changes.items():
        place = content
        *sections, last = path.split(".")
        for section in sections:
            place = place[section]
        place[last] = value
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


async def roll(subject: ClusterHandle, file: Path, overrides: Sequence[str] = (), **how: Any) -> tuple[int, str]:
    """(exit code, what was said) of the command."""
    limits = RolloutLimits(drain_s=SOON_S, start_s=SOON_S, poll_s=0.1)
    options = RolloutOptions(file, overrides, None, subject.operators_url, OPEN, limits, **how)
    out = io.StringIO()
    code = await RolloutCommand(options, Console(file=out, width=200)).roll()
    return code, out.getvalue()


class Load:
    """Two clients that ask one prompt after the other, until they are told to stop. Each answer is held against what
    it must be."""

    def __init__(self, subject: ClusterHandle) -> None:
        self._subject, self._stop = subject, False
        self.answered = 0

    async def __aenter__(self) -> "Load":
        self._clients = [asyncio.create_task(self._ask(number)) for number in range(2)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._clients)

    async def _ask(self, client: int) -> None:
        engine = self._subject.config.engine
        assert isinstance(engine, SimEngineConfig)
        number = 0
        while not self._stop:
            prompt = [3 + (client * 1000 + number * 7 + i) % 200 for i in range(150)]
            answer = await self._subject.stream(prompt, **FIELDS)
            assert answer.token_ids == expected_tokens(engine, prompt, SAMPLING)[0]
            self.answered, number = self.answered + 1, number + 1


async def incarnations(subject: ClusterHandle) -> dict[str, int]:
    return {name: (await subject.node_info(name)).node.incarnation for name in subject.nodes}


async def test_a_cluster_is_rolled_under_load_and_every_request_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router of two processes, so that one of them takes requests at any time."""
    processes = ["router.processes=2", f"router.process_port={neighbours()}"]
    async with launched(tmp_path, monkeypatch, overrides=processes) as subject:
        before, pids = await incarnations(subject), subject.launcher.pids
        file = file_with(tmp_path, "new", {"engine.max_sequences": 32, "router.max_requests": 512})
        code, said = await roll(subject, file, processes, dry_run=True)
        assert code == 0 and said.count("engine.max_sequences: 64 -> 32") == 4
        assert said.count("router.max_requests: 1024 -> 512") == 2 and "metadata-server" not in said
        assert await incarnations(subject) == before
        async with Load(subject) as load:
            code, said = await roll(subject, file, processes, at_once=2)
            assert code == 0, said
            answered = load.answered
            await subject.until(lambda: _more_than(load, answered + 8), SOON_S)
        after = await incarnations(subject)
        assert all(after[name] != before[name] for name in subject.nodes)
        changed = {name for name, pid in subject.launcher.pids.items() if pids[name] != pid}
        assert changed == pids.keys() - {"metadata-server"}
        new = load_config(file, processes)
        for name in subject.nodes:
            report = await subject.node_info(name)
            assert report.settings == node_settings_name(new, name) and not report.draining
            assert report.engine is not None and report.engine.max_sequences == 32
        assert not unfinished(subject.config.cluster)
        assert (await roll(subject, file, processes))[1] == "nothing changes for any process\n"


async def test_a_file_that_the_second_node_cannot_run_by_is_stopped_at_and_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with launched(tmp_path, monkeypatch, prefillers=1, decoders=1) as subject:
        old = {name: (await subject.node_info(name)).settings for name in subject.nodes}
        bad = file_with(tmp_path, "bad", {"engine.max_sequences": 32, "nodes.decode-0.segment": "900TiB"})
        async with Load(subject):
            code, _ = await roll(subject, bad)
            err = capsys.readouterr().err
            assert code == 1 and "decode-0: it did not come up" in err and "--back` returns" in err
            record = RecordFile(subject.config.cluster).read()
            assert record is not None and record.drained == ["decode-0"]
            assert record.done in (["prefill-0"], [])  # whoever answers no probe when it begins comes first
            assert "decode-0" in unfinished(subject.config.cluster)
            code, said = await roll(subject, bad, back=True)
            assert code == 0, said
        assert {name: (await subject.node_info(name)).settings for name in subject.nodes} == old
        await subject.until(subject.all_ready, SOON_S)
        assert not unfinished(subject.config.cluster)
        assert RecordFile(subject.config.cluster).read() is None


async def test_a_node_takes_the_other_role_under_load_and_keeps_it_over_restarts_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = f"metadata_server.records={{kind: sqlite, path: {tmp_path}/records.sqlite}}"
    async with launched(tmp_path, monkeypatch, prefillers=1, decoders=2, overrides=[records]) as subject:
        start = (await subject.node_info("decode-1")).node.incarnation
        async with Load(subject) as load, router_calls(subject.operators_url) as router:
            commands = NodesCommands(subject.operators_url, Console(file=io.StringIO()), poll_s=0.1)
            assert await RoleCommand(commands, "decode-1", "prefiller", wait_s=SOON_S).change(router) == 0
            answered = load.answered
            await subject.until(lambda: _more_than(load, answered + 8), SOON_S)
        assert (await subject.node_info("decode-1")).node.incarnation == start, "its process was not started anew"
        for process in ("metadata-server", "decode-1", "router"):
            pid = subject.launcher.pids[process]
            os.kill(pid, signal.SIGKILL)
            await subject.launcher.wait_restarted(process, pid, SOON_S)

        async def is_prefiller() -> bool:
            nodes = {node["id"]: node for node in (await subject.status())["nodes"]}
            return nodes["decode-1"]["role"] == "prefiller" and all(node["healthy"] for node in nodes.values())

        await subject.until(is_prefiller, SOON_S)


async def test_an_edited_file_is_gone_by_after_a_hangup_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    """What terminals send when they close: it ends nothing."""
    lines: list[str] = []
    async with cluster(tmp_path, prefillers=0, decoders=1) as subject:
        for process in subject.launcher.describe():
            process._on_line = lambda who, line: lines.append(f"{who}: {line}")
        pids = subject.launcher.pids

        async def told(what: str, number: int) -> bool:
            return sum(what in line for line in lines) >= number

        file, good = tmp_path / "cluster.yaml", (tmp_path / "cluster.yaml").read_text()
        file.write_text("nonsense: [")
        await subject.launcher.hang_up()
        await subject.until(lambda: told("reload_failed", 3), SOON_S)
        changes = {"router.policy": "round_robin", "service.log_level": "debug", "engine.max_sequences": 8}
        file.write_text(good)
        file.write_text(file_with(tmp_path, "changed", changes).read_text())
        await subject.launcher.hang_up()
        await subject.until(lambda: told("reloaded", 3), SOON_S)
        assert (await subject.status())["policy"] == "round_robin"
        (left,) = [line for line in lines if "restart_needed" in line]
        assert left.startswith("decode-0: ") and "engine.max_sequences: 64 -> 8" in left
        assert (await subject.complete([5] * 100, max_tokens=2, ignore_eos=True))["usage"]["completion_tokens"] == 2
        assert subject.launcher.pids == pids
    assert any(" DEBUG " in line for line in lines), "it says more from then on"


async def _more_than(load: Load, number: int) -> bool:
    return load.answered > number
