"""The command line of `kvferry nodes`. Imports nothing heavy: what does the work is imported when it is asked for."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.router_url import RouterCommands, router_trust, router_url, seconds, terminal

if TYPE_CHECKING:
    from kvferry.nodes.commands import NodesCommands


def add_node_orders(
    first: "argparse._SubParsersAction[argparse.ArgumentParser]", config_type: Callable[[str], Path]
) -> None:
    """`kvferry drain`, `kvferry resume` and `kvferry role`."""
    commands = RouterCommands(first, config_type, _commands)
    _add_drain(commands)
    _add_undrain(commands, "resume")
    text = "have a node serve as a prefiller or a decoder from now on: it is drained, takes the role, and is used again"
    role = commands.add("role", _role, text)
    role.add_argument("node", metavar="NAME", help="as `kvferry nodes ls` shows it")
    role.add_argument("role", choices=("prefiller", "decoder"))
    text = "what runs there has so long to end (default: 10m); what has not ends there under the new role"
    role.add_argument("--wait", type=seconds, default=600.0, metavar="TIME", help=text)


def add_nodes(parser: argparse.ArgumentParser, config_type: Callable[[str], Path]) -> None:
    """Its commands, and their help."""
    commands = RouterCommands(parser, config_type, _commands)
    commands.add("ls", lambda it, _: it.ls(), "what each node does and since when, and how full it is")
    _add_drain(commands)
    _add_undrain(commands, "undrain")
    text = "forget a node that is gone for good"
    remove = commands.add("remove", lambda it, given: it.order("remove", given.node, force=given.force), text)
    text = "also if it is alive: it is not taken in again until it is started anew"
    remove.add_argument("--force", action="store_true", help=text)
    text = "move chunks from segments that are fuller than the others, until all are about as full; Ctrl-C stops it"
    rebalance = commands.add("rebalance", _rebalance, text)
    rebalance.add_argument("--most", type=_size, default=0, metavar="SIZE", help="move no more than this: 10GiB")
    rebalance.add_argument("--dry-run", action="store_true", help="only say what would be moved")
    remove.add_argument("node", metavar="NAME", help="as ls shows it")


def _add_drain(commands: "RouterCommands[NodesCommands]") -> None:
    text = "give a node no new requests and no new chunks; what runs there ends, and its chunks are read"
    drain = commands.add(
        "drain", lambda it, given: it.order("drain", given.node, move=given.move, wait_s=given.wait), text
    )
    text = "copy its chunks to other nodes, too, the most used first, as far as they have free room"
    drain.add_argument("--move", action="store_true", help=text)
    text = "wait so long (30s, 10m) until nothing is under way there; the exit code is 1 if something still is"
    drain.add_argument("--wait", type=seconds, default=0.0, metavar="TIME", help=text)
    drain.add_argument("node", metavar="NAME", help="as `kvferry nodes ls` shows it")


def _add_undrain(commands: "RouterCommands[NodesCommands]", name: str) -> None:
    text = "use a drained node again, or take a removed one back"
    undrain = commands.add(name, lambda it, given: it.order("undrain", given.node), text)
    undrain.add_argument("node", metavar="NAME", help="as `kvferry nodes ls` shows it")


def _role(commands: "NodesCommands", given: argparse.Namespace) -> int:
    from kvferry.nodes.role import RoleCommand

    return commands.run(RoleCommand(commands, given.node, given.role, given.wait).change)


def _rebalance(commands: "NodesCommands", given: argparse.Namespace) -> int:
    from kvferry.nodes.rebalance import RebalanceCommand

    command, most_bytes = RebalanceCommand(commands.console, commands.as_json), int(given.most)
    work = command.plan if given.dry_run else command.even_out
    return commands.run(lambda router: work(router, most_bytes))


def _size(text: str) -> int:
    from kvcore.config.parse import parse_byte_size

    try:
        size = int(parse_byte_size(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text}: nothing could be moved")
    return size


def _commands(arguments: argparse.Namespace) -> "NodesCommands":
    from kvferry.nodes.commands import NodesCommands

    return NodesCommands(router_url(arguments), terminal(), arguments.json, router_trust(arguments))
