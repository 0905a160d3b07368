"""`metadata-server --config FILE [--set path=value]...`: one process that knows which chunk lies where."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from kvcore.config_file import load_config
from kvcore.errors import ConfigError
from kvcore.service import EXIT_CONFIG, run_process
from metadata_server.service import main as serve

_NAME = "metadata-server"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 ended in order, 1 failed, 2 the configuration or the machine is wrong."""
    parser = argparse.ArgumentParser(prog=_NAME, description="Knows which chunk of KV lies where in a kvferry cluster.")
    parser.add_argument("--config", required=True, metavar="FILE", help="cluster file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override one setting")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.set)
    except ConfigError as error:
        sys.stderr.write(f"{_NAME}: error: {error}\n")
        return EXIT_CONFIG
    return run_process(_NAME, partial(serve, config), log_level=config.service.log_level)


if __name__ == "__main__":
    sys.exit(main())
