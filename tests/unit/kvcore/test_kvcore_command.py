"""The programs of a cluster tell a bad command line in the same way: one line, exit code 2."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kvcore.process.command import config_parser, run_configured
from kvcore.process.service import Lifecycle, Main
from kvcore.types import Role
from kvnode import command
from metadata_server import __main__ as metadata_server
from router import __main__ as router

SIM = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"
PROGRAMS = {
    "router": router.main,
    "metadata-server": metadata_server.main,
    "decoder": lambda arguments: command.main(Role.DECODER, "decoder", arguments),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bad_file_is_one_line_and_exit_code_2(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert PROGRAMS[program](["--config", str(tmp_path / "gone.yaml"), "--set", "router.port=1"]) == 2
    assert capsys.readouterr().err == f"{program}: error: {tmp_path / 'gone.yaml'}: no such file\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_tells_of_overrides(program: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        PROGRAMS[program](["--help"])
    assert "e.g. router.port=8001" in capsys.readouterr().out


def test_a_node_of_another_role_is_refused_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "c.yaml"
    file.write_text(
        "cluster: c\nmodel: {path: sim, name: sim}\nengine: {kind: sim}\nkv: {chunk_tokens: 64}\n"
        "nodes: {d: {role: decoder, port: 1}, e: {role: decoder, port: 2}}\n"
    )
    assert command.main(Role.PREFILLER, "prefiller", ["--config", str(file), "--node", "d"]) == 2
    assert "--node d: it is a decoder, not a prefiller" in capsys.readouterr().err
    assert PROGRAMS["decoder"](["--config", str(file)]) == 2
    assert "--node is missing; nodes of role decoder: d, e" in capsys.readouterr().err


def test_the_log_of_an_open_cluster_says_so(caplog, monkeypatch):
    ran: list[str] = []

    def run(name: str, main: Main, *, log_level: str) -> int:
        asyncio.run(main(Lifecycle(AsyncExitStack(), asyncio.TaskGroup())))
        return 0

    async def nothing(_: Lifecycle) -> None:
        ran.append("main")

    monkeypatch.setattr("kvcore.process.command.run_process", run)
    options = config_parser("x", "x").parse_args(["--config", str(SIM), "--set", "router.host=0.0.0.0"])
    for more, said in (("security.open=true", 1), ("security.secret.file=x", 0)):
        caplog.clear()
        options.overrides = ["router.host=0.0.0.0", more]
        assert run_configured("x", options, lambda config: ("x", nothing)) == 0
        assert caplog.text.count("the cluster is open") == said
    assert ran == ["main", "main"]
