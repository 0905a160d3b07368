"""Where the router is that a command asks: named, in the cluster file, or at the default address. And what it is asked
through."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def add_router_options(parser: argparse.ArgumentParser, config_type: Callable[[str], Path]) -> None:
    """`--config`, `--url` and `--json`."""
    parser.add_argument("--config", type=config_type, help="the cluster file, which says where the router is")
    parser.add_argument("--url", metavar="URL", help="of the router, instead of the address in the config")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def router_url(arguments: argparse.Namespace) -> str:
    """By these options. Raises ConfigError for a file that is none."""
    from kvcore.config.file import load_config
    from kvcore.config.schema import RouterConfig
    from kvcore.ports import base_url
    from kvferry.cli import DEFAULT_CONFIG
    from kvferry.status import addresses

    url = base_url(RouterConfig().host, RouterConfig().port)
    config = arguments.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    if arguments.url is not None:
        url = arguments.url
    elif config is not None:
        url = addresses(load_config(config))[0]
    return str(url).rstrip("/")


def terminal() -> "Console":
    """Where tables go. A pipe has no width: they stay on one line."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)
