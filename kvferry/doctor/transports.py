"""Whether the transports that a config asks for work on this machine: shared memory, TCP, UCX, NIXL, pinned memory."""

import mmap
import os
import resource
from typing import TYPE_CHECKING

from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError
from kvcore.ports import listen
from kvferry.doctor.findings import Context, Finding
from kvferry.machine import size_text
from transfer.memory.copying import PACKAGE, streaming_copy

if TYPE_CHECKING:
    from transfer.ucx.probe import UcxProbe


def check_transports(context: Context) -> list[Finding]:
    """What the config asks for works here."""
    handoff = context.config.handoff
    if not handoff.traits.has_store:
        return [Finding("transport", True, f"none of ours: {handoff} moves the KV, between the servers")]
    kind, fallback = context.config.transport.kind, context.config.transport.fallback
    wanted = {kind, fallback} - {None}
    findings = []
    if wanted & {"auto", "shm"}:
        findings.append(_check_shared_memory())
    if wanted & {"auto", "tcp"}:
        findings.append(_check_tcp())
    if "ucx" in wanted:
        findings += _check_library("ucx", context.config.transport)
    if "nixl" in wanted:
        findings += _check_library("nixl", context.config.transport)
    return findings


def _check_library(kind: str, transport: TransportConfig) -> list[Finding]:
    """UCX, or NIXL with the UCX that it brings: builds, devices, memlock; or what is missing."""
    subject = f"transport {kind}"
    try:
        build, probe = _open_nixl(transport) if kind == "nixl" else _open_ucx(transport)
    except ConfigError as error:
        if transport.fallback is not None:
            return [Finding(subject, True, f"{error.message}; {transport.fallback} is used instead")]
        return [Finding(subject, False, *_split_remedy(error.message))]
    verbs = "with verbs" if "ib" in probe.components else "without verbs"
    found = Finding(subject, True, f"{build} {verbs} uses {', '.join(probe.resources)}")
    return [found, _check_memlock()] if probe.rdma else [found]


def _open_ucx(transport: TransportConfig) -> tuple[str, "UcxProbe"]:
    from transfer.ucx.probe import probe_ucx  # loads the binding, which only those who ask for it need

    probe = probe_ucx(transport)
    return probe.build, probe


def _open_nixl(transport: TransportConfig) -> tuple[str, "UcxProbe"]:
    from transfer.nixl.host import open_nixl

    library, _, probe = open_nixl(transport, "doctor", None)
    return library.build, probe


def _split_remedy(message: str) -> tuple[str, str]:
    wrong, _, remedy = message.rpartition("; ")
    return (wrong, remedy) if wrong else (message, "see docs/rdma.md")


def _check_shared_memory() -> Finding:
    page = mmap.PAGESIZE
    try:
        fd = os.memfd_create("kvferry-doctor")
        try:
            os.ftruncate(fd, page)
            peer = os.open(f"/proc/{os.getpid()}/fd/{fd}", os.O_RDWR)
            try:
                with mmap.mmap(fd, page) as ours, mmap.mmap(peer, page) as theirs:
                    ours[:4] = b"seen"
                    shared = theirs[:4] == b"seen"
            finally:
                os.close(peer)
        finally:
            os.close(fd)
    except OSError as error:
        remedy = "allow memfd_create and /proc/<pid>/fd (seccomp, hidepid), or set `transport: tcp`"
        return Finding("transport shm", False, f"no shared anonymous memory: {error}", remedy)
    assert shared, "two mappings of one memfd differ"
    past = "past the cache" if streaming_copy() else f"through the cache, a third slower ({PACKAGE} is not installed)"
    return Finding("transport shm", True, f"memfd and /proc/<pid>/fd work; large writes go {past}")


def _check_tcp() -> Finding:
    try:
        listen("127.0.0.1", 0).close()
    except ConfigError as error:
        return Finding("transport tcp", False, error.message, "allow TCP sockets, or set `transport: shm`")
    return Finding("transport tcp", True, "sockets bind")


def _check_memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock", True, "unlimited")
    remedy = "set `ulimit -l unlimited` (limits.conf, or LimitMEMLOCK=infinity): RDMA pins segments and KV memory"
    return Finding("memlock", False, f"at most {size_text(soft)} may be pinned", remedy)
