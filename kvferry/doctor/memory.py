"""The doctor's look at what segments are made of: huge pages and NUMA nodes, where the configuration asks for them."""

from kvcore.config.schema import NodeConfig
from kvcore.errors import ConfigError
from kvferry.doctor.findings import Context, Finding
from kvferry.machine import is_local, size_text
from transfer.memory.pages import Pages, choose_pages


def check_segment_pages(context: Context) -> list[Finding]:
    """Huge pages and NUMA nodes that segments of this machine ask for are here, for all of them together."""
    findings = []
    for (hugepages, numa_node), size_bytes in _asked(context).items():
        try:
            pages = choose_pages(size_bytes, hugepages=hugepages, numa_node=numa_node)
        except ConfigError as error:
            wrong, _, remedy = error.message.rpartition("; ")
            findings.append(Finding("segment pages", False, wrong, remedy))
            continue
        where = "" if numa_node is None else f" on NUMA node {numa_node}"
        findings.append(Finding("segment pages", True, f"{size_text(size_bytes)} of {pages}{where}"))
    return findings


def reserved_bytes(context: Context) -> int:
    """Of this machine's segments, what comes out of reserved huge pages and not out of the available memory."""
    total = 0
    for (hugepages, numa_node), size_bytes in _asked(context).items():
        try:
            pages = choose_pages(size_bytes, hugepages=hugepages, numa_node=numa_node)
        except ConfigError:  # `check_segment_pages` tells
            continue
        total += size_bytes if pages is Pages.RESERVED else 0
    return total


def nodes_here(context: Context) -> list[NodeConfig]:
    """Those whose segment is to be made on this machine: it has none yet."""
    return [
        node
        for name, node in context.config.nodes.items()
        if node.url is None and name not in context.running.names and (context.all_here or is_local(node.host))
    ]


def _asked(context: Context) -> dict[tuple[bool, int | None], int]:
    """(hugepages, numa_node) -> bytes, for all that asks for more than plain memory."""
    asked: dict[tuple[bool, int | None], int] = {}
    for node in nodes_here(context):
        if node.hugepages or node.numa_node is not None:
            kind = (node.hugepages, node.numa_node)
            asked[kind] = asked.get(kind, 0) + node.segment
    return asked
