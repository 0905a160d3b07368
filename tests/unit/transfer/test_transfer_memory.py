import fcntl
import os
from pathlib import Path

import pytest

from kvcore.errors import ConfigError, PeerUnreachableError, SegmentUnknownError
from kvcore.types import Segment
from transfer.memory.available import available_memory
from transfer.memory.segment import SegmentMemory, attach, host_identity


def segment(memory: SegmentMemory, **changes: object) -> Segment:
    fields: dict[str, object] = {
        "id": memory.segment_id,
        "node_id": "n",
        "size_bytes": memory.size_bytes,
        "host_id": "h",
        "addresses": {"shm": memory.shm_address},
    }
    return Segment(**{**fields, **changes})  # type: ignore[arg-type]


def test_too_large_a_segment_is_refused_by_size_available_and_key() -> None:
    with pytest.raises(ConfigError, match=rf"nodes\.decode-0\.segment: {1 << 50} bytes .* are available") as caught:
        SegmentMemory.create("decode-0.1f", 1 << 50)
    assert caught.value.param == "nodes.decode-0.segment"
    with pytest.raises(ConfigError, match="at least one byte"):
        SegmentMemory.create("decode-0.1f", 0)


def test_close_with_a_slice_held_keeps_the_slice_and_refuses_peers() -> None:
    memory = SegmentMemory.create("n.1", 8192)
    there = segment(memory)
    held = memory.view[100:104]
    memory.close()
    memory.close()
    held[:] = b"held"
    assert bytes(held) == b"held"
    with pytest.raises(PeerUnreachableError):
        attach(there)


def test_attached_memory_is_the_same_memory_until_the_owner_closes_it() -> None:
    with SegmentMemory.create("n.1", 10_000) as memory:
        peer = attach(segment(memory))
        memory.view[9_999:] = b"!"
        assert peer.view[9_999:] == b"!"
        assert peer.alive
    assert not peer.alive
    peer.close()
    peer.close()


def test_attach_checks_name_size_and_address() -> None:
    with SegmentMemory.create("n.1", 4096) as memory:
        for wrong in (
            segment(memory, id="n.2"),
            segment(memory, size_bytes=4097),
            segment(memory, addresses={"shm": "self:3"}),
            segment(memory, addresses={}),
        ):
            with pytest.raises(SegmentUnknownError):
                attach(wrong)


def test_attach_looks_at_what_it_has_opened_not_at_what_the_address_was_a_moment_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A segment that ends between look and open, its descriptor's number taken by the next of the same size."""
    with SegmentMemory.create("n.2", 4096) as memory:
        link, readlink = f"/proc/{os.getpid()}/fd/{memory.shm_address.partition(':')[2]}", os.readlink
        was = "/memfd:kvferry-n.1 (deleted)"
        monkeypatch.setattr(os, "readlink", lambda path: was if path == link else readlink(path))
        with pytest.raises(SegmentUnknownError):
            attach(segment(memory, id="n.1"))


def test_attach_refuses_memory_that_its_owner_could_shrink_under_us() -> None:
    fd = os.memfd_create("kvferry-n.1", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    lie = Segment(id="n.1", node_id="n", size_bytes=4096, host_id="h", addresses={"shm": f"{os.getpid()}:{fd}"})
    with pytest.raises(SegmentUnknownError, match="seals"):
        attach(lie)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    attach(lie).close()
    os.close(fd)


def test_host_identity_is_stable_within_a_host() -> None:
    assert host_identity() == host_identity()


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/memory.max": "1000\n", "a/memory.current": "900\n", "a/b/memory.max": "max\n"}, 100),
        (
            "0::/\n",
            {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "active_file 50\ninactive_file 20\n"},
            170,
        ),
        (
            "9:cpu,memory:/gone/x\n",
            {"memory/memory.limit_in_bytes": "500\n", "memory/memory.usage_in_bytes": "600\n"},
            0,
        ),
        ("0::/\n", {}, 4096 << 10),
    ],
)
def test_the_tightest_bound_counts(tmp_path: Path, membership: str, files: dict[str, str], expected: int) -> None:
    proc = tree(tmp_path / "proc", {"meminfo": "MemTotal: 9 kB\nMemAvailable: 4096 kB\n", "self/cgroup": membership})
    assert available_memory(proc, tree(tmp_path / "cgroup", files)).size_bytes == expected
