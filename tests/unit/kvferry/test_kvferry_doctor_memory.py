import pytest

from kvcore.config.fields import ByteSize
from kvcore.config.schema import (
    ClusterConfig,
    MetadataServerConfig,
    ModelConfig,
    NodeConfig,
    RouterConfig,
    SimEngineConfig,
)
from kvcore.errors import ConfigError
from kvcore.types import Role
from kvferry.doctor import memory as doctor_memory
from kvferry.doctor.checks import check_memory
from kvferry.doctor.findings import Context
from kvferry.doctor.memory import check_segment_pages
from transfer.memory.pages import Pages


def context(*nodes: NodeConfig) -> Context:
    return Context(
        ClusterConfig(
            cluster="c",
            model=ModelConfig(path="sim", name="sim"),
            engine=SimEngineConfig(num_blocks=16),
            nodes={f"n{index}": node for index, node in enumerate(nodes)},
            metadata_server=MetadataServerConfig(port=0),
            router=RouterConfig(port=0),
        )
    )


def node(**fields: object) -> NodeConfig:
    return NodeConfig(role=Role.DECODER, segment=ByteSize(1 << 30), **fields)  # type: ignore[arg-type]


def test_huge_pages_that_are_not_here_are_told_with_what_all_segments_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size_bytes: int, *, hugepages: bool, numa_node: int | None) -> Pages:
        raise ConfigError(f"hugepages: {size_bytes} bytes are not reserved; reserve them")

    monkeypatch.setattr(doctor_memory, "choose_pages", refuse)
    (finding,) = check_segment_pages(context(node(hugepages=True), node(hugepages=True), node()))
    assert not finding.ok
    assert (finding.detail, finding.remedy) == (f"hugepages: {2 << 30} bytes are not reserved", "reserve them")


def test_a_numa_node_that_is_none_is_told() -> None:
    (finding,) = check_segment_pages(context(node(numa_node=4000)))
    assert not finding.ok
    assert "4000 is none of this machine's nodes" in finding.detail and "leave it out" in finding.remedy


def test_reserved_pages_do_not_count_as_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_memory, "choose_pages", lambda size_bytes, **_: Pages.RESERVED)
    asked = context(node(hugepages=True), node())
    (finding,) = check_segment_pages(asked)
    assert finding.ok and finding.detail == "1.0 GiB of reserved huge pages"
    (memory,) = check_memory(asked)
    assert "1.0 GiB of it segments" in memory.detail


def test_plain_segments_are_not_looked_at() -> None:
    assert check_segment_pages(context(node())) == []
