"""Which of several routers a command asks."""

import argparse
import socket
import threading
from pathlib import Path

import pytest

from kvcore.errors import ConfigError
from kvferry.cli import main
from kvferry.rollout.command import RolloutCommand
from kvferry.router_url import router_url


def file_of(folder: Path, *ports: int) -> argparse.Namespace:
    file = folder / "c.yaml"
    others = [f"127.0.0.1:{port}" for port in ports[1:]]
    file.write_text(
        "cluster: c\nmodel: {path: sim, name: sim}\nengine: {kind: sim}\nnodes: {d0: {role: decoder, port: 1}}\n"
        f"router: {{port: {ports[0]}}}\nrouters: {others}\n"
    )
    return argparse.Namespace(url=None, config=file)


def answer(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")


def test_a_router_that_takes_connections_and_hangs_is_passed_over(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung, socket.create_server(("127.0.0.1", 0)) as there:
        answers = threading.Thread(target=answer, args=(there,), daemon=True)
        answers.start()
        ports = hung.getsockname()[1], there.getsockname()[1]
        assert router_url(file_of(tmp_path, *ports)) == f"http://127.0.0.1:{ports[1]}"
        answers.join()


@pytest.mark.parametrize("words", [[], ["--back"]])
def test_a_rollout_passes_over_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    asked: list[str] = []
    monkeypatch.setattr(RolloutCommand, "run", lambda it: asked.append(it._options.url) or 0)
    with socket.create_server(("127.0.0.1", 0)) as hung, socket.create_server(("127.0.0.1", 0)) as there:
        answers = threading.Thread(target=answer, args=(there,), daemon=True)
        answers.start()
        ports = hung.getsockname()[1], there.getsockname()[1]
        assert main(["rollout", str(file_of(tmp_path, *ports).config), *words]) == 0
        assert asked == [f"http://127.0.0.1:{ports[1]}"]
        answers.join()


def test_where_none_answers_it_is_the_first(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = one.getsockname()[1], other.getsockname()[1]
    assert router_url(file_of(tmp_path, *ports)) == f"http://127.0.0.1:{ports[0]}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections whose timeouts are a hundredth."""
    settimeout = socket.socket.settimeout

    def shorter(it: socket.socket, value: float | None) -> None:
        settimeout(it, value and value / 100)

    monkeypatch.setattr(socket.socket, "settimeout", shorter)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("by", ["file", "url"])
def test_where_the_only_one_hangs_it_is_said_at_once(
    tmp_path: Path, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung:
        url = f"http://127.0.0.1:{hung.getsockname()[1]}"
        file = str(file_of(tmp_path, hung.getsockname()[1]).config)
        assert main(["drain", "d0", *(["--config", file] if by == "file" else ["--url", url])]) == 2
    said = capsys.readouterr().err
    assert f"{url} takes connections and says nothing for 10 s" in said and "kvferry doctor" in said


@pytest.mark.usefixtures("impatient")
def test_where_one_hangs_and_the_other_is_away_it_is_said_of_the_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as away:
        port = away.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as hung:
        ports = port, hung.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{ports[1]} takes connections and says nothing for 2 s"):
            router_url(file_of(tmp_path, *ports))
