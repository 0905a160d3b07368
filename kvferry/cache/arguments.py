"""The command line of `kvferry cache`. Imports nothing heavy: what does the work is imported when it is asked for."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.router_url import RouterCommands, router_trust, router_url, seconds, terminal

if TYPE_CHECKING:
    from kvferry.cache.commands import CacheCommands

_FILES = "a text (a prompt), a JSON body of a request, or JSONL, a body or a line of a batch each; - is stdin"
_Run = Callable[["CacheCommands", argparse.Namespace], int]


def add_cache(parser: argparse.ArgumentParser, config_type: Callable[[str], Path]) -> None:
    """Its commands, and their help."""
    commands = RouterCommands(parser, config_type, _commands)

    def command(name: str, run: _Run, text: str, *, files: bool = False) -> argparse.ArgumentParser:
        made = commands.add(name, run, text)
        if files:
            made.add_argument("files", nargs="+", metavar="FILE", help=_FILES)
            named = "the model or adapter whose KV it is, where a body does not say; not given: the model alone"
            made.add_argument("--model", default="", metavar="NAME", help=named)
            made.add_argument("--tenant", default="", metavar="NAME", help="whose they are, with an admin's key")
        return made

    command("stat", lambda it, _: it.run(it.stat), "hit rate in tokens, by where they were, and a line a tier")
    command("ls", lambda it, _: it.run(it.ls), "generations of KV: where they lie, and whether anybody uses them")
    text = "where the KV of prompts lies: in which memory, in which tier, and what would be computed"
    command("lookup", lambda it, given: it.run(lambda router: it.lookup(router, given.files)), text, files=True)
    text = "compute prompts into the store, behind requests; Ctrl-C stops it, and what was stored stays"
    command("warm", lambda it, given: it.run(lambda router: it.warm(router, given.files)), text, files=True)
    for name, kind, did, text in (
        ("prefetch", "prefetch", "brought into memory", "bring the chunks of prompts from tiers into memory"),
        ("pin", "pin", "pinned", "keep the chunks of prompts from being evicted from memory"),
        ("unpin", "unpin", "unpinned", "let the chunks of prompts be evicted again"),
        ("evict", "evict", "removed", "remove the chunks of prompts from memory and tiers"),
    ):
        command(name, _order(kind, did), text, files=True)
    ttl = command("ttl", _order("expire", "given their time"), "let the chunks of prompts end after a time", files=True)
    text = "30s, 10m, 24h, 7d, or none: never by time"
    ttl.add_argument("--for", dest="ttl_s", type=_ttl, required=True, metavar="TIME", help=text)
    _add_clear(command("clear", _clear, "remove generations of KV from memory and every tier"))
    command("advise", lambda it, _: it.run(it.advise), "the chunk length and sizes that the last hour would have liked")


def _add_clear(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stale", action="store_true", help="only those that no live node uses, here or elsewhere")
    parser.add_argument(
        "--generation", action="append", default=None, metavar="HEX", help="only this one, as ls shows it; repeat it"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    text = "also what other clusters use, and what is stale only as far as the nodes that answer say"
    parser.add_argument("--force", action="store_true", help=text)


def _order(kind: str, did: str) -> _Run:
    def run(commands: "CacheCommands", given: argparse.Namespace) -> int:
        ttl_s = getattr(given, "ttl_s", None)
        return commands.run(lambda router: commands.order(router, kind, did, given.files, ttl_s))

    return run


def _clear(commands: "CacheCommands", given: argparse.Namespace) -> int:
    from router.upkeep.reports import ClearOrder

    order = ClearOrder(stale=given.stale, fingerprints=given.generation, force=given.force)
    return commands.clear(order, yes=given.yes, ask=input if sys.stdin.isatty() else None)


def _ttl(text: str) -> float | None:
    """Seconds; None: never."""
    return None if text == "none" else seconds(text)


def _commands(arguments: argparse.Namespace) -> "CacheCommands":
    from kvferry.cache.commands import CacheCommands

    tenant, model = getattr(arguments, "tenant", ""), getattr(arguments, "model", "")
    trust = router_trust(arguments)
    return CacheCommands(router_url(arguments), terminal(), arguments.json, trust, tenant=tenant, model=model)
