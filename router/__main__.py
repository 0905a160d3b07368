"""`router --config FILE [--set path=value]... [--at HOST:PORT]`: a router of one cluster."""

import sys

from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import as_router_at
from kvcore.process.command import config_parser, run_configured
from kvcore.process.service import Main
from router.service import run_router


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM. Returns the exit code: 2 for a configuration that cannot work, said on stderr."""
    parser = config_parser("router", "The OpenAI API in front of a kvferry cluster.")
    parser.add_argument("--at", metavar="HOST:PORT", help="which of the file's, where it has several; else the first")
    options = parser.parse_args(arguments)

    def choose(config: ClusterConfig) -> tuple[str, Main]:
        seen = as_router_at(config, options.at)
        return "router", lambda lifecycle: run_router(seen, lifecycle)

    return run_configured("router", options, choose)


if __name__ == "__main__":
    sys.exit(main())
