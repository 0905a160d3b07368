"""`router --config FILE [--set path=value]...`: the router of one cluster."""

import sys

from kvcore.process.command import config_parser, run_configured
from router.service import run_router


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM. Returns the exit code: 2 for a configuration that cannot work, said on stderr."""
    options = config_parser("router", "The OpenAI API in front of a kvferry cluster.").parse_args(arguments)
    return run_configured("router", options, lambda config: ("router", lambda lifecycle: run_router(config, lifecycle)))


if __name__ == "__main__":
    sys.exit(main())
