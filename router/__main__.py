"""`router --config FILE [--set path=value]...`: the router of one cluster."""

import argparse
import sys

from kvcore.config_file import load_config
from kvcore.errors import ConfigError
from kvcore.service import EXIT_CONFIG, run_process
from router.service import run_router


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM. Returns the exit code: 2 for a configuration that cannot work, said on stderr."""
    parser = argparse.ArgumentParser(prog="router", description="The OpenAI API in front of a kvferry cluster")
    parser.add_argument("--config", required=True, metavar="FILE", help="the cluster's YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides", help="e.g. router.port=8001"
    )
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        sys.stderr.write(f"router: error: {error}\n")
        return EXIT_CONFIG
    return run_process("router", lambda lifecycle: run_router(config, lifecycle), log_level=config.service.log_level)


if __name__ == "__main__":
    sys.exit(main())
