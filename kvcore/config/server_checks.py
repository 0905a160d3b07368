"""Rules of a cluster file about where its routers and metadata servers are. Pure."""

import re
from collections.abc import Iterator

from kvcore.config.records import EtcdRecordsConfig, SqliteRecordsConfig
from kvcore.config.schema import ClusterConfig, MetadataServerConfig
from kvcore.config.servers import own_ports, partitions_of, routers_of, servers_of
from kvcore.partitions import MAX_PARTITIONS

EVERY_INTERFACE = ("0.0.0.0", "::")


def check_addresses(config: ClusterConfig) -> list[str]:
    """What is wrong, as `path: explanation`; empty: nothing. Until then no other rule may look for them."""
    return [*_check_routers(config), *_check_standbys(config), *_check_partitions(config)]


def _check_routers(config: ClusterConfig) -> Iterator[str]:
    try:
        hosts = [host for host, _ in routers_of(config)]
    except ValueError as error:
        yield f"routers: {error}"
        return
    if config.routers and any(host in EVERY_INTERFACE for host in hosts):
        yield "routers: every interface is none; give each, router.host too, the address by which the others reach it"
    yield from _check_processes(config)
    fixed = [key for key in ("admin_port", "process_port") if getattr(config.router, key) is not None]
    if not config.routers or not fixed:
        return
    if config.router.admin_host is not None:
        yield "router.admin_host: each of several routers has its operators' port on its own host; take it out"
    if len(set(hosts)) < len(hosts):
        yield f"router.{fixed[0]}: two of `routers` are on one host, where only one of them can have this port"


def _check_processes(config: ClusterConfig) -> Iterator[str]:
    ports = own_ports(config)
    if ports and config.router.port == 0:
        yield "router.port: 0 is any free one, and router.processes share one"
    if ports and ports[-1] >= 1 << 16:
        yield f"router.process_port: the last of {len(ports)} processes would have port {ports[-1]}, which there is not"


def _check_standbys(config: ClusterConfig) -> Iterator[str]:
    server = config.metadata_server
    for at, partition in enumerate(partitions_of(server)):
        path = f"metadata_server.partitions[{at}].standbys" if server.partitions else "metadata_server.standbys"
        try:
            servers_of(partition)
        except ValueError as error:
            yield f"{path}: {error}"
        if partition.standbys and not isinstance(server.records, EtcdRecordsConfig):
            yield f"{path}: several metadata servers share their records; set records: {{kind: etcd}}"


def _check_partitions(config: ClusterConfig) -> Iterator[str]:
    server, path = config.metadata_server, "metadata_server.partitions"
    if not server.partitions:
        return
    usual = MetadataServerConfig()
    for field in ("host", "port", "standbys"):
        if getattr(server, field) != getattr(usual, field):
            yield f"metadata_server.{field}: each of the partitions has its own; take it out"
    if len(server.partitions) > MAX_PARTITIONS:
        yield f"{path}: {len(server.partitions)}, and at most {MAX_PARTITIONS} are possible"
    names = [partition.name for partition in server.partitions]
    for at, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            yield f"{path}[{at}].name: {name!r}: a name of letters, digits, - and _"
        elif name in names[:at]:
            yield f"{path}[{at}].name: {name!r} is the name of another one"
        if server.partitions[at].port == 0:
            yield f"{path}[{at}].port: 0 is any free one, which nobody would find"
    if isinstance(server.records, SqliteRecordsConfig) and server.records.path is not None:
        yield "metadata_server.records.path: each of the partitions has a file of its own; take it out"
