"""`metadata-server --config FILE [--set path=value]...`: one process that knows which chunk lies where."""

import sys
from collections.abc import Sequence
from functools import partial

from kvcore.process.command import config_parser, run_configured
from metadata_server.service import main as serve

_NAME = "metadata-server"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 ended in order, 1 failed, 2 the configuration or the machine is wrong."""
    options = config_parser(_NAME, "Knows which chunk of KV lies where in a kvferry cluster.").parse_args(argv)
    return run_configured(_NAME, options, lambda config: (_NAME, partial(serve, config)))


if __name__ == "__main__":
    sys.exit(main())
