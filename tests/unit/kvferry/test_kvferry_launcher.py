import asyncio
import os
import signal
import sys
import textwrap
from dataclasses import replace

import msgspec
import pytest
from support.ports import free_ports
from support.transitions import in_prose, in_table

from kvcore.config.file import load_config
from kvcore.config.schema import (
    ClusterConfig,
    ModelConfig,
    NodeConfig,
    ServiceConfig,
    SimEngineConfig,
)
from kvcore.errors import ConfigError
from kvcore.ports import base_url
from kvcore.process.child import ChildProcess
from kvcore.types import Role
from kvferry.cluster_text import cluster_text
from kvferry.launch.control import LauncherAwayError, LookOrder, RestartOrder, ask_launcher, controlled
from kvferry.launch.launcher import Launcher
from kvferry.launch.limits import LaunchLimits
from kvferry.launch.processes import ProcessKind, ProcessPlan, plan_processes
from kvferry.launch.supervised import TRANSITIONS, ProcessState

SERVER = """
import http.server, signal, sys
port, name = int(sys.argv[1]), sys.argv[2]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
def stop(*args):
    print(name, "bye", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
print(name, "up", flush=True)
server.serve_forever()
"""

CONFIG = ClusterConfig(
    cluster="c",
    model=ModelConfig(path="sim", name="sim"),
    engine=SimEngineConfig(),
    nodes={"p": NodeConfig(role=Role.PREFILLER, port=1), "d": NodeConfig(role=Role.DECODER, port=2)},
    service=ServiceConfig(drain_s=5.0),
)


def serving(name: str, kind: ProcessKind) -> ProcessPlan:
    (port,) = free_ports(1)
    return ProcessPlan(name, kind, (sys.executable, "-c", SERVER, str(port), name), f"http://127.0.0.1:{port}")


def running(name: str, code: str) -> ProcessPlan:
    command = (sys.executable, "-c", textwrap.dedent(code))
    return ProcessPlan(name, ProcessKind.NODE, command, f"http://127.0.0.1:{free_ports(1)[0]}")


def whole() -> list[ProcessPlan]:
    return [
        serving("metadata-server", ProcessKind.METADATA_SERVER),
        serving("d", ProcessKind.NODE),
        serving("router", ProcessKind.ROUTER),
    ]


@pytest.fixture
def make(tmp_path):
    def make(plans, **options) -> Launcher:
        return Launcher(CONFIG, tmp_path / "c.yaml", log_dir=tmp_path / "logs", plans=plans, **options)

    return make


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_process_that_ends_before_it_was_ready_fails_the_launch_and_ends_the_rest(make):
    broken = running("d", "print('model folder is corrupt', flush=True); raise SystemExit(2)")
    launcher = make(
        [serving("metadata-server", ProcessKind.METADATA_SERVER), broken, serving("router", ProcessKind.ROUTER)]
    )
    pids = []
    with pytest.raises(ConfigError) as caught:
        async with launcher:
            await asyncio.sleep(0)  # let the tasks start the children
            pids += launcher.pids.values()
            await launcher.wait_ready(20)
    text = caught.value.message
    assert text.startswith("d ended with exit code 2 before it was ready; its last lines (all: ")
    assert text.endswith("  | model folder is corrupt")
    assert len(pids) == 3 and not any(map(is_running, pids))
    assert launcher.states["d"] in (ProcessState.FAILED, ProcessState.STOPPED)


async def test_a_process_that_never_answers_is_named_when_time_is_up(make):
    launcher = make([running("d", "import time; print('hm', flush=True); time.sleep(60)")])
    async with launcher:
        with pytest.raises(ConfigError, match=r"d was not ready after 0\.5 s \(.+\); its last lines"):
            await launcher.wait_ready(0.5)
        pid = launcher.pids["d"]
    assert not is_running(pid)


async def test_one_that_has_served_is_restarted_when_it_dies(make):
    async with make(whole()) as launcher:
        await launcher.wait_ready(20)
        old = launcher.pids["d"]
        os.kill(old, signal.SIGKILL)
        new = await launcher.wait_restarted("d", old, 20)
        assert new != old and launcher.pids["d"] == new
        assert launcher.restarts == {"metadata-server": 0, "d": 1, "router": 0}
        died = next(event for event in launcher.events if event.state is ProcessState.DIED)
        assert died.name == "d" and "was ended by signal 9; starting it again in 0.2 s" in died.detail


async def test_one_of_several_on_a_port_that_hangs_is_killed_and_started_again(make):
    plans = [serving(name, ProcessKind.ROUTER) for name in ("router.1", "router.2", "router")]
    plans[:2] = [replace(plan, own_url=plan.url) for plan in plans[:2]]
    limits = LaunchLimits(health_timeout_s=0.5, watch_s=0.05, most_silent=3)
    async with make(plans, limits=limits) as launcher:
        await launcher.wait_ready(60)
        hung, alone = launcher.pids["router.2"], launcher.pids["router"]
        for pid in (hung, alone):
            os.kill(pid, signal.SIGSTOP)
        await launcher.wait_restarted("router.2", hung, 60)
        (died,) = [event for event in launcher.events if event.state is ProcessState.DIED]
        assert died.detail.startswith("hung: 3 questions had no answer within 0.5 s each; it was killed; starting it")
        assert launcher.pids["router"] == alone, "it may be stopped by who looks into it, and keeps nobody else's port"
        os.kill(alone, signal.SIGCONT)


async def test_a_node_that_was_drained_stays_down(make):
    async with make(whole()) as launcher:
        await launcher.wait_ready(20)
        for name in ("d", "router"):
            os.kill(launcher.pids[name], signal.SIGTERM)
        await launcher.wait_restarted("router", launcher.pids.get("router", 0), 20)
        async with asyncio.timeout(60):
            await launcher._wait_until(lambda: launcher.states["d"] is ProcessState.STOPPED)
        assert launcher.restarts == {"metadata-server": 0, "d": 0, "router": 1}
        stopped = next(event for event in launcher.events if event.state is ProcessState.STOPPED)
        assert (stopped.name, stopped.detail) == ("d", "drained: it is not started again")


def test_a_router_has_the_time_to_drain(make):
    launcher = make(whole())
    beyond_s = launcher._stop_s[ProcessKind.ROUTER] - launcher._stop_s[ProcessKind.NODE]
    assert beyond_s == CONFIG.router.drain_s
    assert launcher._stop_s[ProcessKind.NODE] > CONFIG.service.drain_s


async def test_one_that_dies_soon_each_time_is_restarted_ever_more_slowly(make):
    async with make(whole()) as launcher:
        await launcher.wait_ready(20)
        for _ in range(2):
            old = launcher.pids["d"]
            os.kill(old, signal.SIGKILL)
            await launcher.wait_restarted("d", old, 20)
        died = [event.detail for event in launcher.events if event.state is ProcessState.DIED]
        assert [detail.rpartition(" in ")[2] for detail in died] == ["0.2 s", "0.4 s"]


async def test_a_full_disk_costs_the_log_and_nothing_else(make):
    lines: list[str] = []
    async with make(whole(), on_line=lambda name, line: lines.append(line)) as launcher:
        for process in launcher._processes.values():
            process._log.close()
            process._log = open("/dev/full", "w", buffering=1)  # noqa: ASYNC230, SIM115, PTH123 - closed by the launcher
        await launcher.wait_ready(20)
        async with asyncio.timeout(60):
            await launcher.aclose()
    assert "d bye" in lines


async def test_stopping_goes_router_nodes_metadata_server_and_leaves_nothing(make):
    lines: list[tuple[str, str]] = []
    async with make(whole(), on_line=lambda name, line: lines.append((name, line))) as launcher:
        await launcher.wait_ready(20)
        pids = list(launcher.pids.values())
    assert [name for name, line in lines if line.endswith("bye")] == ["router", "d", "metadata-server"]
    assert not any(map(is_running, pids)) and launcher.pids == {}
    assert set(launcher.states.values()) == {ProcessState.STOPPED}
    assert launcher.log_file("d").read_text() == "d up\nd bye\n"
    await launcher.aclose()


async def test_cancelling_the_stop_kills_at_once(make):
    stubborn = running(
        "d",
        """
        import signal, time
        signal.signal(signal.SIGTERM, lambda *_: print("ignored", flush=True))
        print("up", flush=True)
        while True: time.sleep(60)
        """,
    )
    said = asyncio.Event()
    ignored = asyncio.Event()
    launcher = make([stubborn], on_line=lambda name, line: (ignored if line == "ignored" else said).set())
    await launcher.start()
    await asyncio.wait_for(said.wait(), 60)
    pid = launcher.pids["d"]
    closing = asyncio.create_task(launcher.aclose())
    await asyncio.wait_for(ignored.wait(), 60)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert not is_running(pid)


async def test_a_log_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    launcher = Launcher(CONFIG, tmp_path / "c.yaml", log_dir=tmp_path / "file", plans=whole())
    with pytest.raises(ConfigError, match=r"cannot write the log .*--log-dir"):
        async with launcher:
            pass


async def test_the_output_of_the_launch_before_is_kept(make):
    for _ in range(2):
        async with make([serving("d", ProcessKind.NODE)]) as launcher:
            await launcher.wait_ready(20)
    assert launcher.log_file("d").with_name("d.log.1").read_text() == "d up\nd bye\n"


async def test_kill_minus_9_of_the_launcher_leaves_no_child(tmp_path):
    code = f"""
        import asyncio, sys
        from pathlib import Path
        sys.path[:0] = {sys.path!r}
        from test_kvferry_launcher import CONFIG, whole
        from kvferry.launch.launcher import Launcher
        async def main():
            async with Launcher(CONFIG, Path("c.yaml"), log_dir=Path({str(tmp_path)!r}), plans=whole()) as launcher:
                await launcher.wait_ready(20)
                print(*launcher.pids.values(), flush=True)
                await asyncio.Event().wait()
        asyncio.run(main())
    """
    pids: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
    launcher = await ChildProcess.start(
        [sys.executable, "-c", textwrap.dedent(code)],
        on_line=lambda line: pids.set_result(list(map(int, line.split()))),
    )
    children = await asyncio.wait_for(pids, 60)
    descriptors = [os.pidfd_open(pid) for pid in children]
    os.kill(launcher.pid, signal.SIGKILL)
    await asyncio.wait_for(launcher.wait(), 60)
    for descriptor in descriptors:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, ended.set)
        await asyncio.wait_for(ended.wait(), 60)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


def test_plans_name_every_process_with_its_command(tmp_path):
    file = tmp_path / "c.yaml"
    plans = plan_processes(CONFIG, file, ["router.port=1"])
    options = ("--config", str(file), "--set", "router.port=1")
    assert [(plan.name, plan.kind, plan.command[1:]) for plan in plans] == [
        ("metadata-server", ProcessKind.METADATA_SERVER, ("-P", "-m", "metadata_server", *options)),
        ("p", ProcessKind.NODE, ("-P", "-m", "prefiller", *options, "--node", "p")),
        ("d", ProcessKind.NODE, ("-P", "-m", "decoder", *options, "--node", "d")),
        ("router", ProcessKind.ROUTER, ("-P", "-m", "router", *options)),
    ]
    assert plans[-1].health_url == "http://127.0.0.1:8000/health"


def test_each_of_several_routers_is_a_process_that_is_told_where_it_is(tmp_path):
    config = msgspec.structs.replace(CONFIG, routers=["127.0.0.1:8001", "[::1]:8002"])
    plans = plan_processes(config, tmp_path / "c.yaml")[-3:]
    assert [(plan.name, plan.command[-2:], plan.url) for plan in plans] == [
        ("router", ("--config", str(tmp_path / "c.yaml")), "http://127.0.0.1:8000"),
        ("router-2", ("--at", "127.0.0.1:8001"), "http://127.0.0.1:8001"),
        ("router-3", ("--at", "[::1]:8002"), "http://[::1]:8002"),
    ]


def test_each_process_of_a_router_is_told_which_it_is_and_asked_at_a_port_of_its_own(tmp_path):
    router = msgspec.structs.replace(CONFIG.router, processes=2, process_port=9000)
    config = msgspec.structs.replace(CONFIG, router=router, routers=["192.0.2.1:8000"])
    plans = plan_processes(config, tmp_path / "c.yaml")[-4:]
    ours, others = "http://127.0.0.1:8000", "http://192.0.2.1:8000"
    assert [(plan.name, plan.command[-2:], plan.url, plan.health_url) for plan in plans] == [
        ("router.1", ("--process", "1"), ours, "http://127.0.0.1:9000/health"),
        ("router.2", ("--process", "2"), ours, "http://127.0.0.1:9001/health"),
        ("router-2.1", ("--process", "1"), others, "http://192.0.2.1:9000/health"),
        ("router-2.2", ("--process", "2"), others, "http://192.0.2.1:9001/health"),
    ]
    assert all("--at" in plan.command for plan in plans[2:])


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
        ("fe80::1", "http://[fe80::1]:1"),
        ("h", "http://h:1"),
    ],
)
def test_an_address_that_stands_for_all_is_reached_by_loopback(host, url):
    assert base_url(host, 1) == url


def test_in_front_of_servers_that_run_already_only_the_router_is_started(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "{cluster: c, handoff: nixl, model: {path: m, name: m}, nodes: {d: {role: decoder, url: 'http://h:1'}}}"
    )
    (plan,) = plan_processes(load_config(file), file)
    assert plan.kind is ProcessKind.ROUTER and plan.health_url == "http://127.0.0.1:8000/health"


def test_the_prose_of_a_processs_states_is_the_table_that_is_asserted_on():
    assert set(TRANSITIONS) == set(ProcessState)
    assert in_prose(ProcessState) == in_table(TRANSITIONS)


async def test_a_launcher_says_what_it_keeps_up(make):
    launcher = make([serving("d", ProcessKind.NODE)])
    assert repr(launcher) == "<Launcher not started>"
    async with launcher:
        await launcher.wait_ready(20)
        assert repr(launcher) == "<Launcher d ready>"
        assert repr(launcher._processes["d"]) == f"<SupervisedProcess d, ready, pid {launcher.pids['d']}, 0 restarts>"
    assert repr(launcher) == "<Launcher d stopped>"


@pytest.mark.slow
async def test_a_process_is_started_anew_by_another_plan_when_that_is_ordered(make, tmp_path, monkeypatch):
    """Over the launcher's socket. One that does not come up then is tried again, and fails no launch."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("long" * 30)))  # longer than a socket's address may be
    file = tmp_path / "c.yaml"
    file.write_text(cluster_text(CONFIG))
    plans = whole()
    monkeypatch.setattr("kvferry.launch.control.plan_processes", lambda *_: [replace(plans[1], command=again)])
    again = (*plans[1].command[:-1], "new")
    lines: list[str] = []
    async with make(plans, on_line=lambda _, line: lines.append(line)) as launcher:
        await launcher.wait_ready(30)
        async with controlled(launcher, "c"):
            with pytest.raises(ConfigError, match="runs on this machine already"):
                async with controlled(launcher, "c"):
                    pass
            pid = launcher.pids["d"]
            reply = await ask_launcher("c", RestartOrder(name="d", file=str(file)), 30)
            assert not reply.problem and not is_running(pid)
            await launcher.wait_restarted("d", pid, 30)
            assert "d bye" in lines and "new up" in lines and launcher.started_with("d") == load_config(file)
            again = ("false",)
            await ask_launcher("c", RestartOrder(name="d", file=str(file)), 30)
            await launcher._wait_until(lambda: "exit code 1" in launcher.describe()[1].detail)
            looked = {one.name: one for one in (await ask_launcher("c", LookOrder(), 30)).processes}
            assert looked["router"].state == "ready" and looked["d"].last_lines[-1] == "new bye"
            assert load_config(looked["d"].file) == load_config(file)
            assert "no such file" in (await ask_launcher("c", RestartOrder(name="d", file="nowhere"), 30)).problem
            unknown = RestartOrder(name="nobody", file=str(file))
            assert "nobody is not both" in (await ask_launcher("c", unknown, 30)).problem
    with pytest.raises(LauncherAwayError):
        await ask_launcher("c", LookOrder(), 1)


@pytest.mark.slow
async def test_a_node_that_was_drained_and_stays_down_is_started_when_that_is_ordered(make):
    plans = whole()
    async with make(plans) as launcher:
        await launcher.wait_ready(30)
        os.kill(launcher.pids["d"], signal.SIGTERM)
        await launcher._wait_until(lambda: launcher.states["d"] is ProcessState.STOPPED)
        await launcher.restart(plans[1], CONFIG)
        await launcher._wait_until(lambda: launcher.states["d"] is ProcessState.READY)
