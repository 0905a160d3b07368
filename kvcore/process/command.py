"""The command line that every process of a cluster has: which file, what to override, and how a bad file is told."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from kvcore.config.checks import open_line
from kvcore.config.file import load_config
from kvcore.config.live.file import LiveFile
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.process.service import EXIT_CONFIG, Lifecycle, Main, run_process
from kvcore.telemetry import log_fields, set_log_level

_logger = logging.getLogger("kvcore.trust")


def config_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with `--config` and `--set`; the caller adds what is its own."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="the cluster's YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="overrides",
        help="override one value of the file, e.g. router.port=8001; may be given again",
    )
    return parser


def run_configured(
    program: str, options: argparse.Namespace, choose: Callable[[ClusterConfig], tuple[str, Main]]
) -> int:
    """Run what `choose` makes of the configuration (a process's name and its main) to its end; returns the exit code.

    A ConfigError of the file or of `choose` is one line on stderr and code 2.
    """
    try:
        config = load_config(options.config, options.overrides)
        name, main = choose(config)
    except ConfigError as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        return EXIT_CONFIG
    return run_process(name, _following(options, config, main), log_level=config.service.log_level)


def _following(options: argparse.Namespace, config: ClusterConfig, main: Main) -> Main:
    """The file is read again at each SIGHUP."""

    async def follow_and_run(lifecycle: Lifecycle) -> None:
        if (line := open_line(config)) is not None:
            log_fields(_logger, logging.WARNING, "open", problem=line)
        lifecycle.file = LiveFile(Path(options.config), options.overrides, config)
        lifecycle.file.take(["service.log_level"], lambda new: set_log_level(new.service.log_level))
        lifecycle.on_hangup(lifecycle.file.read_again)
        await main(lifecycle)

    return follow_and_run
