"""`router --config FILE [--set path=value]... [--at HOST:PORT] [--process NUMBER]`: a router of one cluster."""

import gc
import sys

from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import as_router_at, process_name, router_name, routers_of
from kvcore.errors import ConfigError
from kvcore.process.command import config_parser, run_configured
from kvcore.process.service import Main
from router.processes.reports import ProcessPlace
from router.service import run_router


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM. Returns the exit code: 2 for a configuration that cannot work, said on stderr."""
    parser = config_parser("router", "The OpenAI API in front of a kvferry cluster.")
    parser.add_argument("--at", metavar="HOST:PORT", help="which of the file's, where it has several; else the first")
    parser.add_argument("--process", type=int, metavar="NUMBER", help="which of router.processes, from 1 on")
    options = parser.parse_args(arguments)

    # A request leaves no garbage in cycles. To look for some each 700 objects took a tenth of its time, each 5,000 a
    # twentieth: as many are made and freed anew by a few dozen requests that are under way.
    gc.set_threshold(50_000)

    def choose(config: ClusterConfig) -> tuple[str, Main]:
        seen = as_router_at(config, options.at)
        place = _place(config, seen, options.process)
        return place.name or "router", lambda lifecycle: run_router(seen, lifecycle, place)

    return run_configured("router", options, choose)


def _place(config: ClusterConfig, seen: ClusterConfig, process: int | None) -> ProcessPlace:
    """Raises ConfigError."""
    count = seen.router.processes
    if process is None and count > 1:
        raise ConfigError(f"--process NUMBER: missing; the router has processes 1 to {count}")
    if process is not None and not 1 <= process <= count:
        raise ConfigError(f"--process {process}: router.processes of the file is {count}")
    if count == 1:
        return ProcessPlace()
    at = routers_of(config).index((seen.router.host, seen.router.port))
    return ProcessPlace(process_name(router_name(at + 1), process or 1), process or 1)


if __name__ == "__main__":
    sys.exit(main())
