"""Which processes a cluster file stands for, and how each is started. Pure."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import (
    address_of,
    addresses_of,
    as_router_at,
    internal_url,
    partitions_of,
    process_name,
    process_urls,
    router_name,
    router_url_of,
    routers_of,
    servers_of,
)
from kvcore.types import Role


class ProcessKind(StrEnum):
    """What a process is in the cluster."""

    METADATA_SERVER = "metadata-server"
    NODE = "node"
    ROUTER = "router"


STOP_ORDER = ((ProcessKind.ROUTER,), (ProcessKind.NODE,), (ProcessKind.METADATA_SERVER,))
"""First who takes requests, then who answers them, last who is told that nodes leave."""

_MODULES = {Role.PREFILLER: "prefiller", Role.DECODER: "decoder", Role.STORE: "kvnode"}


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process: its name in logs, the command, and where it answers."""

    name: str
    kind: ProcessKind
    command: tuple[str, ...]
    url: str
    own_url: str | None = None
    """Where this process of several that share `url` is asked."""

    @property
    def health_url(self) -> str:
        """Answers 200 once the process serves."""
        return f"{self.own_url or self.url}/health"


def plan_processes(config: ClusterConfig, config_file: Path, overrides: Sequence[str] = ()) -> list[ProcessPlan]:
    """Metadata servers, nodes in the file's order, routers. In front of servers that run already: routers alone."""
    options = ["--config", str(config_file.resolve()), *(word for item in overrides for word in ("--set", item))]

    def plan(name: str, kind: ProcessKind, module: str, host: str, port: int, *more: str) -> ProcessPlan:
        # -P: a folder called `router` where the user stands must not be taken for ours
        command = (sys.executable, "-P", "-m", module, *options, *more)
        return ProcessPlan(name, kind, command, internal_url(config, host, port))

    server = config.metadata_server
    routers = []
    for number, (host, port) in enumerate(routers_of(config), start=1):
        at = ("--at", address_of(host, port)) if number > 1 else ()
        seen = as_router_at(config, address_of(host, port))
        one = replace(plan(router_name(number), ProcessKind.ROUTER, "router", host, port, *at), url=router_url_of(seen))
        processes = [
            replace(
                one,
                name=process_name(one.name, process),
                command=(*one.command, "--process", str(process)),
                own_url=own_url,
            )
            for process, own_url in enumerate(process_urls(seen), start=1)
        ]
        routers += processes or [one]
    if not config.handoff.traits.has_store:
        return routers
    metadata = [
        plan(
            *(_server_name(partition.name, number), ProcessKind.METADATA_SERVER, "metadata_server", host, port),
            *(("--at", address) if number > 1 or server.partitions else ()),
        )
        for partition in partitions_of(server)
        for number, (address, (host, port)) in enumerate(
            zip(addresses_of(partition), servers_of(partition), strict=True), start=1
        )
    ]
    return [
        *metadata,
        *(
            plan(name, ProcessKind.NODE, _MODULES[node.role], node.host, node.port, "--node", name)
            for name, node in config.nodes.items()
        ),
        *routers,
    ]


def _server_name(partition: str, number: int) -> str:
    """`number`: of the partition's servers, from 1 on."""
    parts = ["metadata-server", partition, str(number) if number > 1 else ""]
    return "-".join(filter(None, parts))
