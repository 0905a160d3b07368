"""Mooncake's own clients and master on our metadata server: they put and get, are killed and come back, as it is."""

import http.client
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

from support import mooncake_client
from support.mooncake_server import HOST, MooncakeServer, needs_mooncake
from support.netns import two_machines

pytestmark = list(needs_mooncake)
ROOT = Path(__file__).resolve().parents[2]
PORT = 8080
KEYS = itertools.count()
CONFIG = {
    "security": {"open": True},  # HOST is beyond the namespace's loopback
    "cluster": "mooncake",
    "model": {"path": "sim", "name": "sim"},
    "engine": {"kind": "sim"},
    "nodes": {
        "p": {"role": "prefiller", "host": HOST, "port": 8801, "segment": "1MiB"},
        "d": {"role": "decoder", "host": HOST, "port": 8802, "segment": "1MiB"},
    },
}


class Machine:
    """A network namespace with a master, our server, and clients; all of them are gone in the end."""

    def __init__(self, inside: tuple[str, ...], folder: Path, master: MooncakeServer, **mooncake: object) -> None:
        self._inside, self._folder, self._master = inside, folder, master
        self.token: str | None = None
        settings = {"host": HOST, "port": PORT, "mooncake": {"every_s": 0.5, **mooncake}}
        records = {"kind": "sqlite", "path": str(folder / "records.sqlite")}
        (folder / "cluster.yaml").write_text(
            json.dumps({**CONFIG, "metadata_server": {**settings, "records": records}})
        )
        self._server: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []

    @property
    def url(self) -> str:
        given = "" if self.token is None else f"any:{self.token}@"
        return f"http://{given}{HOST}:{PORT}/metadata"

    def start(self) -> None:
        command = [sys.executable, "-m", "metadata_server", "--config", str(self._folder / "cluster.yaml")]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "KV_TEST_TOKEN": self.token or ""}
        with (self._folder / "server.log").open("ab") as log:
            self._server = subprocess.Popen([*self._inside, *command], stdout=log, stderr=log, env=env)
        until_true(self._answers, 20.0, self.log)

    def _answers(self) -> bool:
        assert self._server is not None and self._server.poll() is None, self.log()
        try:
            return self.ask("GET", "nothing")[0] == 404
        except OSError:
            return False

    def kill(self) -> None:
        assert self._server is not None
        self._server.kill()
        self._server.wait()

    def dump(self) -> str:
        """The log, after the server was asked to write how its parts are."""
        assert self._server is not None
        self._server.send_signal(signal.SIGUSR1)
        self.ask("GET", "nothing")
        return self.log()

    def log(self) -> str:
        return (self._folder / "server.log").read_text()

    def ask(self, method: str, key: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, PORT, timeout=5)
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        try:
            connection.request(method, f"/metadata?key={urllib.parse.quote(key, safe='')}", headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def has(self, name: str) -> bool:
        return all(self.ask("GET", f"mooncake/{kind}/{name}")[0] == 200 for kind in ("rpc_meta", "ram"))

    def client(self, port: int) -> "Client":
        started = Client(self._inside, f"{HOST}:{port}", self.url, self._master.master, self._folder)
        self._clients.append(started)
        return started

    def forget(self, client: "Client") -> None:
        """Kill it, and wait until the master has dropped its memory: who has its name later would take it for its own,
        and read there what it never had."""
        client.kill()

        def dropped() -> bool:
            lines = self._master.log("mooncake_master").splitlines()
            return any(client.name in line and "action=unmount_expired_mem_segment" in line for line in lines)

        until_true(dropped, 30.0, lambda: self._master.log("mooncake_master"))

    def end(self) -> None:
        for client in self._clients:
            client.kill()
        if self._server is not None:
            self.kill()


class Client:
    """A process with a Mooncake client; `setup` is what its set-up returned."""

    def __init__(self, inside: tuple[str, ...], name: str, metadata: str, master: str, folder: Path) -> None:
        self.name = name
        self.log = folder / f"client-{name}-{len(list(folder.iterdir()))}.log"
        command = [*inside, sys.executable, mooncake_client.__file__, name, metadata, master]
        with self.log.open("wb") as log:
            pipe = subprocess.PIPE
            env = {**os.environ, "MC_TE_METADATA_REFRESH_INTERVAL_SECONDS": "1"}  # else it never asks again
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.setup = self._answer()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())
        self._lines.put("ended")

    def _answer(self) -> str:
        return self._lines.get(timeout=30)

    def ask(self, *words: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        assert self.ask("close") == "ended"
        self.process.wait()


@contextmanager
def machine(folder: Path, token: str | None = None, **mooncake: object) -> Iterator[Machine]:
    with ExitStack() as stack:
        machines = stack.enter_context(two_machines("veth"))
        stack.enter_context(machines.entered())
        server = MooncakeServer(machines, folder)
        stack.callback(server.end)
        server.start("--client_ttl=2")
        made = Machine(machines.inside[0], folder, server, **mooncake)
        made.token = token
        stack.callback(made.end)
        made.start()
        yield made


def until_true(check: Callable[[], bool], timeout_s: float, log: Callable[[], str]) -> None:
    end = monotonic() + timeout_s
    while not check():
        assert monotonic() < end, log()
        os.sched_yield()


def removed(log: str) -> str:
    return "".join(line for line in log.splitlines() if "mooncake_owner_removed" in line)


def exchanged(writer: Client, reader: Client) -> Callable[[], bool]:
    """Whether what one puts the other gets. A key is new each time: one that failed says nothing of the next."""

    def works() -> bool:
        key = f"{writer.name}-{reader.name}-{next(KEYS)}"
        return writer.ask("put", key, f"value-of-{key}") == "0" and reader.ask("get", key) == f"value-of-{key}"

    return works


def test_clients_put_and_get_and_one_that_was_killed_comes_back_under_its_name(tmp_path: Path) -> None:
    with machine(tmp_path) as there:
        one, two = there.client(17001), there.client(17002)
        assert (one.setup, two.setup) == ("0", "0"), one.log.read_text() + there.log()
        assert one.ask("put", "a", "from-one") == two.ask("put", "b", "from-two") == "0"
        assert one.ask("get", "b") == "from-two" and two.ask("get", "a") == "from-one"
        third = there.client(17002)
        assert third.setup != "0", "a live client has that name"
        assert "http=400 body: Duplicate rpc_meta key not allowed: a live client at" in third.log.read_text()
        assert two.ask("get", "a") == "from-one"

        there.forget(one)
        began = monotonic()
        again = there.client(17001)
        assert again.setup == "0", again.log.read_text() + there.log()
        assert monotonic() - began < 30
        for pair in ((again, two), (two, again)):
            until_true(exchanged(*pair), 20.0, there.log)
        for client in (again, two):
            client.close()
            assert there.ask("GET", f"mooncake/rpc_meta/{client.name}") == (404, "metadata not found")
            assert there.ask("GET", f"mooncake/ram/{client.name}") == (404, "metadata not found")
        assert "handshake" not in two.log.read_text(), "probes are no errors in a client's log"


def test_our_server_is_killed_and_started_again_and_all_goes_on(tmp_path: Path) -> None:
    with machine(tmp_path) as there:
        one, two = there.client(17001), there.client(17002)
        for pair in ((one, two), (two, one)) * 4:  # wherever the master places what they put, they know each other
            until_true(exchanged(*pair), 20.0, there.log)
        values = {key: there.ask("GET", key) for key in (f"mooncake/{kind}/{one.name}" for kind in ("rpc_meta", "ram"))}
        there.kill()
        for pair in ((one, two), (two, one)):
            until_true(exchanged(*pair), 20.0, there.log)
        there.start()
        assert {key: there.ask("GET", key) for key in values} == values
        three = there.client(17003)
        assert three.setup == "0", three.log.read_text()
        for pair in ((one, two), (three, one), (two, three)):
            until_true(exchanged(*pair), 20.0, there.log)
        there.forget(one)
        again = there.client(17001)
        assert again.setup == "0", again.log.read_text() + there.log()
        for pair in ((again, three), (three, again), (two, again)):
            until_true(exchanged(*pair), 20.0, there.log)


def test_the_keys_of_the_dead_go_and_those_of_the_stopped_stay(tmp_path: Path) -> None:
    with machine(tmp_path, token="s3cret", token_env="KV_TEST_TOKEN") as there:
        one, two = there.client(17001), there.client(17002)
        assert (one.setup, two.setup) == ("0", "0"), one.log.read_text() + there.log()
        assert one.ask("put", "a", "from-one") == "0" and two.ask("get", "a") == "from-one"
        until_true(lambda: "2 owners, 2 have answered" in there.dump(), 20.0, there.log)
        two.process.send_signal(signal.SIGSTOP)
        one.kill()
        until_true(lambda: f"mooncake/ram/{one.name}" in removed(there.log()), 30.0, there.log)
        for kind in ("rpc_meta", "ram"):
            assert there.ask("GET", f"mooncake/{kind}/{one.name}") == (404, "metadata not found")
        assert there.has(two.name)
        two.process.send_signal(signal.SIGCONT)
        until_true(exchanged(two, two), 30.0, there.log)  # the master takes it in again
        there.token = None
        assert there.ask("GET", f"mooncake/ram/{two.name}") == (401, "a token is needed")
        assert there.client(17003).setup != "0"
