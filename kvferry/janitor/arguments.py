"""The command line of `kvferry janitor`. Imports nothing heavy: what does the work is imported when it is asked for."""

import argparse
from collections.abc import Callable
from pathlib import Path

from kvferry.router_url import add_router_options, router_trust, router_url, seconds, terminal


def add_janitor(parser: argparse.ArgumentParser, config_type: Callable[[str], Path]) -> None:
    """Its options, and their help."""
    add_router_options(parser, config_type)
    text = "remove what is shown, where it is orphaned still when its turn comes"
    parser.add_argument("--apply", action="store_true", help=text)
    text = "orders about nodes, and pins, are orphaned only if they are as old as this (default: 24h)"
    parser.add_argument("--older", dest="older_s", type=seconds, default=86_400.0, metavar="TIME", help=text)
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from kvferry.janitor.command import JanitorCommand

    command = JanitorCommand(
        router_url(arguments), terminal(), arguments.older_s, arguments.json, router_trust(arguments)
    )
    return command.run(apply=arguments.apply)
