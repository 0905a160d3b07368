"""The process that serves a segment by UCX or NIXL, for `transfer.host_process`: run as `python -m transfer.host_child
REQUEST`. What it replies are lines of its output. It knows no secret, only what greetings are proved with.
"""

import asyncio
import mmap
import os
import signal
import sys

import msgspec

from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError
from kvcore.telemetry import configure_logging
from transfer.base import SegmentHost
from transfer.greeting import GreetingKey, Keys
from transfer.limits import TransferLimits

REPLY_PREFIX = "host-process: "


class HostRequest(msgspec.Struct, frozen=True):
    """What the process is to serve. Inherited: `fd`, the segment's memfd; `keys_fd`, a pipe with lines of keys."""

    kind: str
    segment_id: str
    size_bytes: int
    fd: int
    keys_fd: int
    config: TransportConfig
    limits: TransferLimits
    log_level: str


class HostReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """First `address`, or why there is none; then what `refused` counts, as SegmentHost's."""

    address: str = ""
    error: str = ""
    param: str | None = None
    refused: dict[str, int] = {}


def _host(request: HostRequest, memory: memoryview, keys: Keys) -> SegmentHost:
    """Loads the library."""
    if request.kind == "nixl":
        from transfer.nixl.host import NixlSegmentHost

        return NixlSegmentHost(request.segment_id, memory, request.config, request.limits.nixl, keys)
    from transfer.ucx.transport import UcxSegmentHost

    return UcxSegmentHost(request.segment_id, memory, request.config, request.limits.ucx, keys)


def _print_reply(reply: HostReply) -> None:
    sys.stdout.write(REPLY_PREFIX + msgspec.json.encode(reply).decode() + "\n")
    sys.stdout.flush()


class _Keyring:
    """The child's: what greetings are proved with, as the node said last through a pipe. Blocks until it has once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._line = b""
        self.keys: tuple[GreetingKey, ...] = ()
        while not self._line.endswith(b"\n"):
            self._line += os.read(fd, 1 << 16)
        self._take_lines()
        os.set_blocking(fd, False)

    def __repr__(self) -> str:
        return f"<_Keyring {self.keys!r}>"

    def read(self) -> bool:
        """What has come; False at the pipe's end."""
        try:
            part = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return True
        self._line += part
        self._take_lines()
        return bool(part)

    def _take_lines(self) -> None:
        *lines, self._line = self._line.split(b"\n")
        if lines:
            self.keys = msgspec.json.decode(lines[-1], type=tuple[GreetingKey, ...])


async def _report(host: SegmentHost, every_s: float) -> None:
    """Whom it refuses: the node counts it."""
    said: dict[str, int] = {}
    while True:
        await asyncio.sleep(every_s)
        if (now := dict(host.refused)) != said:
            said = now
            _print_reply(HostReply(refused=now))


async def _serve(request: HostRequest) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    keyring = _Keyring(request.keys_fd)
    loop.add_reader(request.keys_fd, lambda: keyring.read() or loop.remove_reader(request.keys_fd))
    mapping = mmap.mmap(request.fd, request.size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    os.close(request.fd)
    host = _host(request, memoryview(mapping), lambda: keyring.keys)
    try:
        await host.start()
    except ConfigError as error:
        _print_reply(HostReply(error=error.message, param=error.param))
        return
    _print_reply(HostReply(address=host.address))
    reports = asyncio.create_task(_report(host, request.limits.host_process.report_s))
    await stop.wait()
    reports.cancel()
    await host.aclose()


def main() -> None:
    """The process: serve until SIGTERM."""
    request = msgspec.json.decode(sys.argv[1], type=HostRequest)
    configure_logging(f"{request.segment_id}.{request.kind}", request.log_level)
    asyncio.run(_serve(request))


if __name__ == "__main__":
    main()
