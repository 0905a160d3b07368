import os
from pathlib import Path

import pytest

from kvcore.errors import ConfigError
from kvcore.types import Segment
from transfer.memory import segment as memory_module
from transfer.memory.pages import Pages, choose_pages, default_hugepage_bytes
from transfer.memory.segment import SegmentMemory, attach

PAGE = default_hugepage_bytes()


def machine(root: Path, *, free: int = 0, promised: int = 0, on_node: int = 0, shared: str = "never") -> Path:
    """A /sys with one NUMA node, `free` huge pages of which some are promised, and a setting for transparent ones."""
    pool = f"hugepages/hugepages-{PAGE >> 10}kB"
    words = ("always", "within_size", "advise", "never", "deny", "force")
    files = {
        f"kernel/mm/{pool}/free_hugepages": f"{free}\n",
        f"kernel/mm/{pool}/resv_hugepages": f"{promised}\n",
        f"devices/system/node/node0/{pool}/free_hugepages": f"{on_node}\n",
        "kernel/mm/transparent_hugepage/shmem_enabled": " ".join(f"[{w}]" if w == shared else w for w in words),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_huge_pages_that_are_not_there_are_an_error_with_both_remedies(tmp_path: Path) -> None:
    sysfs = machine(tmp_path, free=9, promised=6)
    with pytest.raises(ConfigError, match=r"4 reserved huge pages of .* are needed and 3 are free") as caught:
        choose_pages(4 * PAGE, hugepages=True, sysfs=sysfs)
    assert "vm.nr_hugepages=4" in caught.value.message and "echo advise" in caught.value.message
    with pytest.raises(ConfigError, match="not in this kernel"):
        choose_pages(PAGE, hugepages=True, sysfs=tmp_path / "nowhere")


def test_huge_pages_on_another_node_do_not_count(tmp_path: Path) -> None:
    sysfs = machine(tmp_path, free=9, on_node=1)
    assert choose_pages(2 * PAGE, hugepages=True, sysfs=sysfs) is Pages.RESERVED
    with pytest.raises(ConfigError, match="1 are free on node 0"):
        choose_pages(2 * PAGE, hugepages=True, numa_node=0, sysfs=sysfs)


def test_an_unknown_node_is_an_error_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"numa_node: 3 .* \(node0\)"):
        choose_pages(PAGE, hugepages=False, numa_node=3, sysfs=machine(tmp_path))


def test_part_of_a_reserved_page_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no multiple of a huge page"):
        choose_pages(PAGE + 4096, hugepages=True, sysfs=machine(tmp_path, free=9))


@pytest.mark.parametrize(("shared", "expected"), [("advise", Pages.TRANSPARENT), ("force", Pages.TRANSPARENT)])
def test_transparent_pages_are_taken_where_the_kernel_gives_them(tmp_path: Path, shared: str, expected: Pages) -> None:
    assert choose_pages(PAGE, hugepages=True, sysfs=machine(tmp_path, shared=shared)) is expected
    assert choose_pages(PAGE, hugepages=False, sysfs=tmp_path) is Pages.NORMAL


def test_a_segment_that_cannot_have_them_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^nodes\.n\.numa_node: 4000"):
        SegmentMemory.create("n.1", 4096, numa_node=4000)

    def bound_nowhere(*_: object) -> None:
        raise ConfigError("numa_node: memory cannot be bound")

    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    monkeypatch.setattr(memory_module, "bind_to_node", bound_nowhere)
    with pytest.raises(ConfigError, match="cannot be bound"):
        SegmentMemory.create("n.1", 4096, numa_node=0)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("hugepages", [False, True])
def test_memory_as_asked_for_is_mapped_by_peers(hugepages: bool) -> None:
    try:
        made = SegmentMemory.create("n.1", 2 * PAGE, hugepages=hugepages, numa_node=0)
    except ConfigError as error:
        pytest.skip(error.message)
    with made as memory:
        peer = attach(
            Segment(
                id="n.1",
                node_id="n",
                size_bytes=memory.size_bytes,
                host_id="h",
                addresses={"shm": memory.shm_address},
            )
        )
        memory.view[-1:] = b"!"
        assert peer.alive and peer.view[-1:] == b"!"
        peer.close()


def test_the_rest_of_a_large_mapping_is_filled_in_and_its_close_ends_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_ATTACH_POPULATE_BYTES", 4096)
    monkeypatch.setattr(memory_module, "_POPULATE_STEP_BYTES", 4096)
    with SegmentMemory.create("n.1", 5 * 4096 + 1) as memory:
        peer = attach(
            Segment(
                id="n.1",
                node_id="n",
                size_bytes=memory.size_bytes,
                host_id="h",
                addresses={"shm": memory.shm_address},
            )
        )
        populated: list[int] = []
        populate = memory_module._populate
        monkeypatch.setattr(
            memory_module, "_populate", lambda mapping, at, n: (populated.append(at), populate(mapping, at, n))
        )
        assert peer.unpopulated_bytes == 4 * 4096 + 1
        peer.populate_rest()
        assert populated == [4096, 8192, 3 * 4096, 4 * 4096, 5 * 4096]
        peer.close()
        peer.populate_rest()
        assert len(populated) == 5
