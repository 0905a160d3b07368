"""NIXL's agent over its own bindings: raw addresses, errors translated, versions known. Knows no transfer.

Loads the wheel `nixl-cu12` and neither the meta package `nixl` nor torch: both are only asked for to find out CUDA's
version. NIXL's `nixl_agent` is not used, for its progress thread never sleeps (one processor each, NIXL 1.5.1).
"""

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcore.errors import ConfigError, PeerUnreachableError, SegmentUnknownError
from transfer.base import Direction
from transfer.nixl.descriptor import Versions
from transfer.ucx.binding import UcxLibrary, ffi, load_library

_DISTRIBUTION, _MODULE = "nixl-cu12", "nixl_cu12"
_BACKEND = "UCX"
_PROGRESS_US = 10_000
"""How often NIXL's progress thread looks although no event woke it; 0 would mean that it never sleeps."""
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_ENVIRONMENT = threading.Lock()

Ranges = Sequence[tuple[int, int]]
"""(address, size) each."""


@dataclass(frozen=True, slots=True)
class NixlLibrary:
    """The loaded wheel: its bindings, what they raise, and the UCX that it brings."""

    bindings: Any
    failures: tuple[type[Exception], ...]
    versions: Versions
    ucx: UcxLibrary

    @property
    def build(self) -> str:
        """For people."""
        return f"NIXL {'.'.join(map(str, self.versions.nixl))} with {self.ucx.build}"


@functools.cache
def load_nixl() -> NixlLibrary:
    """Load the wheel, once a process. Raises ConfigError when it is not there or is not as expected."""
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
        bindings = _import_bindings()
    except (importlib.metadata.PackageNotFoundError, ImportError) as error:
        raise ConfigError(
            f"transport.kind: nixl needs the wheel {_DISTRIBUTION}, which cannot be used here: {error}; install it "
            f"with `pip install --no-deps {_DISTRIBUTION}` (or 'kvferry[nixl]', with torch)",
            param="transport.kind",
        ) from error
    numbers = [int(number) for number in re.findall(r"\d+", version)[:3]]
    libraries = sorted((Path(bindings.__file__).parents[1] / f"{_MODULE}.libs").glob("libucp-*.so*"))
    if len(libraries) != 1 or len(numbers) != 3:
        raise ConfigError(f"{_DISTRIBUTION} {version} is another build than PyPI's: it brings {len(libraries)} libucp")
    ucx = load_library(str(libraries[0]))
    failures = tuple(
        found
        for name, found in vars(bindings).items()
        if name.startswith("nixl") and isinstance(found, type) and issubclass(found, Exception)
    )
    versions = Versions((numbers[0], numbers[1], numbers[2]), ucx.version[:2])
    return NixlLibrary(bindings, (*failures, RuntimeError, ValueError), versions, ucx)


def _import_bindings() -> Any:
    """Import the wheel without what it does to logging: its own handlers, and silence about broken ones."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # it logs to stdout and stderr; what fails we say ourselves
    raises = logging.raiseExceptions
    try:
        bindings = importlib.import_module(f"{_MODULE}._bindings")
    finally:
        logging.raiseExceptions = raises
    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    return bindings


def address_of(view: memoryview) -> int:
    """Where a buffer's bytes lie. The caller keeps it alive."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(view)))


def has_nvidia_gpu(pci: Path = _PCI) -> bool:
    """Whether NIXL will insist on UCX's CUDA support."""
    for device in pci.glob("*"):
        try:
            found = [(device / name).read_text().strip() for name in ("vendor", "class")]
        except OSError:
            continue
        if found[0] == _NVIDIA and found[1].startswith(_DISPLAY):
            return True
    return False


def nixl_options(options: Mapping[str, str], gpu: bool) -> dict[str, str]:
    """UCX's options (names without UCX_) as NIXL takes them: it refuses a TLS without CUDA where there is a GPU."""
    return {**options, "TLS": f"{options['TLS']},cuda_copy"} if gpu else dict(options)


class NixlAgent:
    """One agent with UCX below. All of it is called from one thread at a time, but for opening and closing.

    `progress`: NIXL's own thread moves it on, which a host needs; without, every call of `state` and `messages` does.
    Opening raises ConfigError.
    """

    def __init__(self, library: NixlLibrary, name: str, options: Mapping[str, str], *, progress: bool) -> None:
        self.name = name
        self._library = library
        self._nixl = nixl = library.bindings
        config = nixl.nixlAgentConfig()
        config.useProgThread = progress
        config.useListenThread = False
        config.pthrDelay = _PROGRESS_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        try:
            with _environment(options):
                self._agent = nixl.nixlAgent(name, config)
                self._backend = self._agent.createBackend(_BACKEND, {})
        except library.failures as error:
            raise ConfigError(
                f"{library.build}: no agent with {dict(options)}: {error}", param="transport.kind"
            ) from error

    def register(self, ranges: Ranges) -> Any:
        """Make memory known (for RDMA: pin it) until `deregister` of the result. Raises ConfigError."""
        registered = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(at, size, 0, "") for at, size in ranges])
        try:
            self._agent.registerMem(registered, [self._backend])
        except self._library.failures as error:
            size = sum(size for _, size in ranges)
            raise ConfigError(
                f"{self._library.build}: cannot register {size} bytes (RDMA pins them: see `ulimit -l`): {error}"
            ) from error
        return registered

    def deregister(self, registered: Any) -> None:
        """Undo `register`."""
        with contextlib.suppress(*self._library.failures):
            self._agent.deregisterMem(registered, [self._backend])

    def metadata(self) -> bytes:
        """How to reach this agent and all that is registered."""
        return bytes(self._agent.getLocalMD())

    def load(self, metadata: bytes) -> str:
        """Connect to the agent whose metadata it is; its name. Raises PeerUnreachableError."""
        try:
            name = self._agent.loadRemoteMD(metadata)
        except self._library.failures as error:
            raise PeerUnreachableError(f"NIXL cannot connect: {error}") from error
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def drop(self, name: str) -> None:
        """Let go of a connection. No request on it may be left: NIXL would free it a second time."""
        with contextlib.suppress(*self._library.failures):
            self._agent.invalidateRemoteMD(name)

    def send(self, name: str, message: bytes) -> None:
        """A notification. Raises PeerUnreachableError once the connection is known to be broken."""
        try:
            self._agent.genNotif(name, message, [self._backend])
        except self._library.failures as error:
            raise PeerUnreachableError(f"NIXL cannot send: {error}") from error

    def messages(self) -> dict[str, list[bytes]]:
        """Notifications since the last call, by the sender's name. Moves the agent on."""
        found: dict[str, list[bytes]] = self._agent.getNotifs({}, [self._backend])
        return found

    def post(self, direction: Direction, local: Ranges, remote: Ranges, name: str) -> int:
        """Begin moving bytes; the request, to be released. Raises PeerUnreachableError or SegmentUnknownError."""
        nixl = self._nixl
        operation = nixl.NIXL_READ if direction == "read" else nixl.NIXL_WRITE
        sides = [nixl.nixlXferDList(nixl.DRAM_SEG, [(at, size, 0) for at, size in one]) for one in (local, remote)]
        try:
            request = int(self._agent.createXferReq(operation, *sides, name, "", [self._backend]))
        except self._library.failures as error:
            raise SegmentUnknownError(f"NIXL knows no registration of such memory: {error}") from error
        try:
            self._agent.postXferReq(request, "")
        except self._library.failures as error:
            self.release(request)
            raise PeerUnreachableError(f"the connection broke: {error}") from error
        return request

    def finished(self, request: int) -> bool:
        """Whether all of it has landed. Moves the agent on. Raises PeerUnreachableError."""
        try:
            status = self._agent.getXferStatus(request)
        except self._library.failures as error:
            raise PeerUnreachableError(f"the connection broke: {error}") from error
        return bool(status == self._nixl.NIXL_SUCCESS)

    def release(self, request: int) -> None:
        """Free a request, once. One under way goes on moving bytes until the agent is closed."""
        with contextlib.suppress(*self._library.failures):
            self._agent.releaseXferReq(request)

    def close(self) -> None:
        """Cut every connection; afterwards nothing touches memory that was registered. Takes some ms."""
        del self._agent


@contextlib.contextmanager
def _environment(options: Mapping[str, str]) -> Iterator[None]:
    """UCX's options where NIXL lets UCX find them. Its own parameter for them cannot hold a list."""
    names = {f"UCX_{name}": value for name, value in options.items()}
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
