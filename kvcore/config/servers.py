"""Where a cluster file's servers are: metadata servers and the partitions of the index, routers and their processes.

Pure.
"""

import msgspec

from kvcore.config.partitions import PartitionConfig
from kvcore.config.schema import ClusterConfig, MetadataServerConfig
from kvcore.errors import ConfigError
from kvcore.partitions import Part, Partitions
from kvcore.ports import base_url


def partitions_of(server: MetadataServerConfig) -> list[PartitionConfig]:
    """In the file's order; a file without any has one, which has no name."""
    alone = PartitionConfig(name="", host=server.host, port=server.port, standbys=server.standbys)
    return server.partitions or [alone]


def servers_of(partition: PartitionConfig) -> list[tuple[str, int]]:
    """(host, port) of each: the first, then the standbys in the file's order. Raises ValueError for what is neither."""
    return [(partition.host, partition.port), *(_host_and_port(text) for text in partition.standbys)]


def addresses_of(partition: PartitionConfig) -> list[str]:
    """HOST:PORT of each, in the same order: what `--at` takes."""
    return [address_of(host, port) for host, port in servers_of(partition)]


def urls_of(partition: PartitionConfig) -> list[str]:
    """http://host:port of each, in the same order."""
    return [base_url(host, port) for host, port in servers_of(partition)]


def metadata_servers(server: MetadataServerConfig) -> list[tuple[str, int]]:
    """Those of all partitions, one after the other. Raises ValueError as `servers_of`."""
    return [each for partition in partitions_of(server) for each in servers_of(partition)]


def metadata_urls(server: MetadataServerConfig) -> list[str]:
    """http://host:port of each, in the same order."""
    return [base_url(host, port) for host, port in metadata_servers(server)]


def own_part(server: MetadataServerConfig) -> Part | None:
    """Which partition a server is of, given the file as `as_server_at` gives it; None: the file has none."""
    names = tuple(partition.name for partition in server.partitions)
    for number, partition in enumerate(server.partitions):
        if (server.host, server.port) in servers_of(partition):
            return Part(Partitions(names), number)
    return None


def router_url_of(config: ClusterConfig) -> str:
    """http://host:port of the router, or https:// where it has a certificate."""
    url = base_url(config.router.host, config.router.port)
    return url if config.router.tls is None else url.replace("http", "https", 1)


def operators_url_of(config: ClusterConfig) -> str:
    """Where the router is asked about the cluster and given orders: at its `admin_port`, if it has one."""
    router = config.router
    if router.admin_port is None:
        return router_url_of(config)
    url = base_url(router.admin_host or router.host, router.admin_port)
    return url if router.tls is None and config.security.tls is None else url.replace("http", "https", 1)


def routers_of(config: ClusterConfig) -> list[tuple[str, int]]:
    """(host, port) of each: that of `router`, then the others in the file's order. Raises ValueError for what is
    neither."""
    return [(config.router.host, config.router.port), *(_host_and_port(text) for text in config.routers)]


def as_router_at(config: ClusterConfig, address: str | None) -> ClusterConfig:
    """The file as the router at `address` (HOST:PORT) sees it: that is where it listens, and `routers` are the others.
    None: the first. Raises ConfigError if the file names no such router."""
    routers = [address_of(host, port) for host, port in routers_of(config)]
    if address is None or address == routers[0]:
        return config
    if address not in routers:
        raise ConfigError(f"--at {address}: the file's routers are {', '.join(routers)}")
    host, port = _host_and_port(address)
    seen = msgspec.structs.replace(config.router, host=host, port=port)
    return msgspec.structs.replace(config, router=seen, routers=[other for other in routers if other != address])


def router_urls_of(config: ClusterConfig) -> list[str]:
    """Of all routers, in the same order."""
    return [router_url_of(one) for one in _each_router(config)]


def operators_urls_of(config: ClusterConfig) -> list[str]:
    """Where each of them is asked about the cluster, in the same order."""
    return [operators_url_of(one) for one in _each_router(config)]


def _each_router(config: ClusterConfig) -> list[ClusterConfig]:
    return [as_router_at(config, address_of(host, port)) for host, port in routers_of(config)]


def own_ports(config: ClusterConfig) -> list[int]:
    """Of this router's processes, in order; empty: it is one process, which has none but the router's."""
    router = config.router
    first = router.port + 1 if router.process_port is None else router.process_port
    return list(range(first, first + router.processes)) if router.processes > 1 else []


def own_host(config: ClusterConfig) -> str:
    """What they listen on there: the operators' host."""
    return config.router.admin_host or config.router.host


def process_urls(config: ClusterConfig) -> list[str]:
    """Where operators ask each of this router's processes; empty: it is one process."""
    return [_own_url(config, port) for port in own_ports(config)]


def other_urls(config: ClusterConfig, process: int) -> list[str]:
    """Where operators ask every other process of all routers of the file. `process`: which of this router's we are,
    from 1 on."""
    own = process_urls(config)
    siblings = [url for number, url in enumerate(own, start=1) if number != process]
    if not own:
        return operators_urls_of(config)[1:]
    others = (as_router_at(config, address_of(host, port)) for host, port in routers_of(config)[1:])
    return [*siblings, *(url for other in others for url in process_urls(other))]


def router_name(number: int) -> str:
    """What the file's routers are called in logs, from 1 on."""
    return f"router-{number}" if number > 1 else "router"


def process_name(router: str, process: int) -> str:
    """What the process is called in logs and answers: `router.2`."""
    return f"{router}.{process}"


def _own_url(config: ClusterConfig, port: int) -> str:
    router = msgspec.structs.replace(config.router, admin_port=port)
    return operators_url_of(msgspec.structs.replace(config, router=router))


def internal_url(config: ClusterConfig, host: str, port: int) -> str:
    """http://host:port of what only the cluster's own processes ask, or https:// where they have certificates."""
    return secured_url(config, base_url(host, port))


def secured_url(config: ClusterConfig, url: str) -> str:
    """The same of an http:// URL."""
    return url if config.security.tls is None else url.replace("http:", "https:", 1)


def as_server_at(config: ClusterConfig, address: str | None) -> ClusterConfig:
    """The file as the metadata server at `address` (HOST:PORT) sees it: that is where it listens, and the others of its
    partition are its standbys. None: the first, where there are no partitions. Raises ConfigError if the file names no
    such server."""
    server = config.metadata_server
    if address is None and not server.partitions:
        return config
    named = [addresses_of(partition) for partition in partitions_of(server)]
    everyone = ", ".join(name for names in named for name in names)
    if address is None:
        raise ConfigError(f"--at HOST:PORT: missing; the file's metadata servers are {everyone}")
    own = next((names for names in named if address in names), None)
    if own is None:
        raise ConfigError(f"--at {address}: the file's metadata servers are {everyone}")
    host, port = _host_and_port(address)
    others = [name for name in own if name != address]
    seen = msgspec.structs.replace(server, host=host, port=port, standbys=others)
    return msgspec.structs.replace(config, metadata_server=seen)


def address_of(host: str, port: int) -> str:
    """HOST:PORT, as `--at` takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text}: expected HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
