"""Commands that ask a router: how they are added to a command line, where the router is, and what it is asked through.

It is named, in the cluster file, or at the default address. Imports nothing heavy.
"""

import argparse
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from rich.console import Console

    from kvcore.config.schema import ClusterConfig
    from kvcore.trust.opening import ClusterTrust

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_Commands = TypeVar("_Commands")


class RouterCommands(Generic[_Commands]):
    """The commands below one, or some of the first (given what they are added to), each with the options that say where
    the router is."""

    def __init__(
        self,
        parser: "argparse.ArgumentParser | argparse._SubParsersAction[argparse.ArgumentParser]",
        config_type: Callable[[str], Path],
        make: Callable[[argparse.Namespace], _Commands],
    ) -> None:
        """`make`: what carries them out, by the arguments; imported when one is asked for."""
        if isinstance(parser, argparse.ArgumentParser):
            parser = parser.add_subparsers(metavar="WHAT", required=True)
        self._commands = parser
        self._config_type, self._make = config_type, make

    def add(self, name: str, run: Callable[[_Commands, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        """One more; returns its parser."""
        made = self._commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=lambda arguments: run(self._make(arguments), arguments))
        add_router_options(made, self._config_type)
        return made


def seconds(text: str) -> float:
    """Of `30s`, `10m`, `24h`, `7d` or a number, as the type of an argument."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        found = float(number) * _UNITS[unit]
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 30s, 10m, 24h, 7d")
    return found


def add_router_options(parser: argparse.ArgumentParser, config_type: Callable[[str], Path]) -> None:
    """`--config`, `--url` and `--json`."""
    parser.add_argument("--config", type=config_type, help="the cluster file, which says where the router is")
    parser.add_argument("--url", metavar="URL", help="of the router, instead of the address in the config")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def router_url(arguments: argparse.Namespace) -> str:
    """By these options. Raises ConfigError for a file that is none, and where a router hangs."""
    from kvcore.config.schema import RouterConfig
    from kvcore.ports import base_url

    if arguments.url is None and (config := _config(arguments)) is not None:
        url = url_that_answers(config)
    else:
        url = _first_that_answers([arguments.url or base_url(RouterConfig().host, RouterConfig().port)])
    return url.rstrip("/")


def url_that_answers(config: "ClusterConfig") -> str:
    """Where operators ask the first router of the file that says a word; where all are away, the first. Raises
    ConfigError where one hangs and no other answers."""
    from kvcore.config.servers import operators_urls_of

    return _first_that_answers(operators_urls_of(config))


def _first_that_answers(urls: Sequence[str]) -> str:
    from kvcore.errors import ConfigError

    hung, wait_s = [], 10.0 if len(urls) == 1 else 2.0  # one that is busy may say nothing for seconds
    for url in urls:
        try:
            if _answers(url, wait_s):
                return url
        except TimeoutError:
            hung.append(url)
    if hung:
        text = f"{hung[0]} takes connections and says nothing for {wait_s:g} s: its process hangs, or is stopped"
        raise ConfigError(f"{text}. Continue or restart it; `kvferry doctor` looks further")
    return urls[0]


def _answers(url: str, wait_s: float) -> bool:
    """Whether it says a word: the kernel takes connections for one that hangs. Raises TimeoutError: only that."""
    import ssl

    where = urlsplit(url)
    try:
        port = where.port or (443 if where.scheme == "https" else 80)
        connection = socket.create_connection((where.hostname, port), timeout=2.0)
    except (OSError, ValueError):  # what a URL that is none says is said where it is asked
        return False
    with connection:
        connection.settimeout(wait_s)
        try:
            if where.scheme == "https":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # whoever it is: nothing is told it here
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                context.wrap_socket(connection).close()
            else:
                connection.sendall(b"GET /ping HTTP/1.0\r\n\r\n")
                connection.recv(1)
        except TimeoutError:
            raise
        except ssl.SSLError:  # of a certificate that it asks for
            return True
        except OSError:
            return False
    return True


def router_trust(arguments: argparse.Namespace) -> "ClusterTrust":
    """What the cluster file says by which the router knows us. Raises ConfigError."""
    from kvcore.trust.opening import OPEN, open_trust, trust_source

    config = _config(arguments)
    return OPEN if config is None else open_trust(trust_source(config))


def _config(arguments: argparse.Namespace) -> "ClusterConfig | None":
    from kvcore.config.file import load_config
    from kvferry.cli import DEFAULT_CONFIG

    file = arguments.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() and arguments.url is None else None)
    return None if file is None else load_config(file)


def key_headers() -> dict[str, str]:
    """The API key that `KVFERRY_API_KEY` of the environment has, as headers of a request."""
    key = os.environ.get("KVFERRY_API_KEY", "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def terminal() -> "Console":
    """Where tables go. A pipe has no width: they stay on one line."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)
