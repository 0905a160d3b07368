"""`metadata-server --config FILE [--set path=value]... [--at HOST:PORT] [--change-partitions]`: knows which chunk lies
where.
"""

import sys
from collections.abc import Sequence
from functools import partial

from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import as_server_at
from kvcore.process.command import config_parser, run_configured
from kvcore.process.service import Main
from metadata_server.service import main as serve

_NAME = "metadata-server"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 ended in order, 1 failed, 2 the configuration or the machine is wrong."""
    parser = config_parser(_NAME, "Knows which chunk of KV lies where in a kvferry cluster.")
    parser.add_argument("--at", metavar="HOST:PORT", help="which of the file's, where it has several; else the first")
    parser.add_argument(
        "--change-partitions",
        action="store_true",
        help="the file's partitions are the index's from now on, whatever its records say",
    )
    options = parser.parse_args(argv)

    def choose(config: ClusterConfig) -> tuple[str, Main]:
        seen = as_server_at(config, options.at)
        return _NAME, partial(serve, seen, change_partitions=options.change_partitions)

    return run_configured(_NAME, options, choose)


if __name__ == "__main__":
    sys.exit(main())
