"""The launcher's own socket, by which commands on this machine have one of its processes started anew.

Owns a Unix socket in the cluster's state folder, for the user alone who runs the launcher, and the files that say by
which settings each process was last started. A JSON line is asked, a JSON line answered, one a connection. What was
ordered is carried out, whether or not who asked stays.
"""

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import msgspec

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.state_folder import state_folder
from kvferry.cluster_text import cluster_text
from kvferry.launch.launcher import Launcher
from kvferry.launch.limits import LaunchLimits
from kvferry.launch.processes import plan_processes

_SOCKET = "launcher.sock"


class LookOrder(msgspec.Struct, tag_field="do", tag="look", frozen=True):
    """How the processes are."""


class RestartOrder(msgspec.Struct, tag_field="do", tag="restart", frozen=True, kw_only=True):
    """Start a process anew, by this file. It is answered when the one of before has ended."""

    name: str
    file: str
    overrides: list[str] = []


class LaunchedProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a launcher. `said`: the last of its state; `file`: the settings that it was started with;
    `restarts`: how often it was started again."""

    name: str
    kind: str
    state: str
    pid: int | None
    said: str
    file: str
    restarts: int = 0
    last_lines: list[str] = []


class LauncherReply(msgspec.Struct, frozen=True, kw_only=True):
    """`problem`: why what was asked for is not done; empty: it is."""

    processes: list[LaunchedProcess] = []
    problem: str = ""


class LauncherAwayError(Exception):
    """No launcher of this cluster runs on this machine, or it does not answer."""


def revision_file(cluster: str, config: ClusterConfig) -> Path:
    """A file of its own, in the cluster's state folder, from which this configuration can be read again. Raises
    ConfigError. Blocking."""
    text = cluster_text(config)
    folder = state_folder(cluster) / "revisions"
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(f".{os.getpid()}.new")
            draft.touch(mode=0o600)  # a tier's URL may have a password
            draft.write_text(text, encoding="utf-8")
            draft.replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    return file


@asynccontextmanager
async def controlled(launcher: Launcher, cluster: str, limits: LaunchLimits = LaunchLimits()) -> AsyncIterator[None]:
    """Orders are taken for as long as it is entered. Raises ConfigError where the socket cannot be had: another
    launcher of the cluster has it, or the folder cannot be written."""
    async with AsyncExitStack() as stack:
        try:
            path = stack.enter_context(_reachable(cluster, make=True))
            listener = stack.enter_context(_listener(path))
            server = await asyncio.start_unix_server(
                lambda reader, writer: _answer(launcher, cluster, limits, reader, writer),
                sock=listener,
                limit=limits.max_order_bytes,
            )
        except OSError as error:
            raise ConfigError(f"no socket in {state_folder(cluster)}: {error.strerror or error}") from error
        stack.callback(server.close)
        stack.callback(lambda: Path(path).unlink(missing_ok=True))
        yield


async def ask_launcher(cluster: str, order: LookOrder | RestartOrder, timeout_s: float) -> LauncherReply:
    """What this machine's launcher of the cluster answers. Raises LauncherAwayError."""
    try:
        async with asyncio.timeout(timeout_s):
            with _reachable(cluster, make=False) as path:
                reader, writer = await asyncio.open_unix_connection(path, limit=1 << 24)
            try:
                writer.write(msgspec.json.encode(order) + b"\n")
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
        return msgspec.json.decode(line, type=LauncherReply)
    except (OSError, TimeoutError, ValueError, msgspec.DecodeError) as error:
        raise LauncherAwayError(f"no `kvferry up` of cluster {cluster} answers on this machine: {error}") from error


async def _answer(
    launcher: Launcher,
    cluster: str,
    limits: LaunchLimits,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    with suppress(OSError):  # whoever asked has gone
        try:
            async with asyncio.timeout(limits.health_timeout_s):
                line = await reader.readline()
            order = msgspec.json.decode(line, type=LookOrder | RestartOrder)
            reply = await _carry_out(launcher, cluster, order)
        except (ConfigError, TimeoutError, ValueError, msgspec.DecodeError) as error:
            reply = LauncherReply(problem=str(error) or "the order did not come in time")
        writer.write(msgspec.json.encode(reply) + b"\n")
        await writer.drain()
        writer.close()


async def _carry_out(launcher: Launcher, cluster: str, order: LookOrder | RestartOrder) -> LauncherReply:
    if isinstance(order, RestartOrder):
        config = await asyncio.to_thread(load_config, order.file, order.overrides)
        plans = {plan.name: plan for plan in plan_processes(config, Path(order.file), order.overrides)}
        if order.name not in plans or order.name not in launcher.states:
            raise ConfigError(f"{order.name} is not both in {order.file} and among the launcher's processes")
        await launcher.restart(plans[order.name], config)
    files = {name: revision_file(cluster, launcher.started_with(name)) for name in launcher.states}
    return LauncherReply(
        processes=[
            LaunchedProcess(
                name=one.name,
                kind=one.plan.kind.value,
                state=one.state.value,
                pid=one.pid,
                said=one.detail,
                file=str(files[one.name]),
                restarts=one.restarts,
                last_lines=one.last_lines[-10:],
            )
            for one in launcher.describe()
        ]
    )


@contextmanager
def _reachable(cluster: str, *, make: bool) -> Iterator[str]:
    """The socket's path, short enough for an address of a socket (107 bytes): by the folder's descriptor."""
    folder = state_folder(cluster)
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{_SOCKET}"
    finally:
        os.close(descriptor)


@contextmanager
def _listener(path: str) -> Iterator[socket.socket]:
    """Raises OSError: somebody listens there. What a launcher that was killed has left is replaced."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            Path(path).unlink(missing_ok=True)
        else:
            raise OSError("a launcher of this cluster runs on this machine already")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        Path(path).chmod(0o600)  # nobody can connect before `listen`
        listener.listen()
        yield listener
