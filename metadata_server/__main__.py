"""`metadata-server --config FILE [--set path=value]... [--at HOST:PORT]`: knows which chunk lies where."""

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
    parser.add_argument("--at", metavar="HOST:PORT", help="which of the file's, where it has standbys; else the first")
    options = parser.parse_args(argv)

    def choose(config: ClusterConfig) -> tuple[str, Main]:
        return _NAME, partial(serve, config if options.at is None else as_server_at(config, options.at))

    return run_configured(_NAME, options, choose)


if __name__ == "__main__":
    sys.exit(main())
