"""The command line of `kvferry blend`. Imports nothing heavy: what does the work is imported when it is asked for."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.router_url import RouterCommands, router_trust, router_url, terminal

if TYPE_CHECKING:
    from kvferry.blend.commands import BlendCommands

_HEADER = "the system prompt that stands before the documents, as your requests have it"


def add_blend(parser: argparse.ArgumentParser, config_type: Callable[[str], Path]) -> None:
    """Its commands, and their help."""
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    commands = RouterCommands(kinds, config_type, _commands)
    commands.add("status", lambda it, _: it.status(), "whether documents are reused, and what that costs")
    text = "reuse documents again of kinds that were turned off because that changed answers too much"
    on = commands.add("on", lambda it, given: it.turn_on(given.kinds or None), text)
    on.add_argument("kinds", nargs="*", metavar="KIND", help="as `status` shows it (default: all)")
    text = "compute the documents of a folder into the store before requests come, behind requests that do"
    warm = commands.add("warm", lambda it, given: it.warm(given.folder, given.header), text)
    warm.add_argument("folder", type=Path, metavar="FOLDER", help="a document a file; those of folders in it, too")
    warm.add_argument("--header", type=Path, metavar="FILE", help=_HEADER)
    text = "what reuse would cost on your own documents and questions, and which setting to take"
    _add_check(kinds.add_parser("check", help=text, description=text), config_type)


def _add_check(check: argparse.ArgumentParser, config_type: Callable[[str], Path]) -> None:
    check.add_argument("model", metavar="MODEL", help="a folder in Hugging Face format, or a hub id")
    check.add_argument("--documents", type=Path, required=True, metavar="FOLDER", help="a file each")
    check.add_argument("--questions", type=Path, required=True, metavar="FILE", help="a question a line")
    check.add_argument("--header", type=Path, metavar="FILE", help=_HEADER)
    text = "whose engine it is for, and whose limits (kv.blend) are gone by"
    check.add_argument("--config", type=config_type, metavar="FILE", help=text)
    text = "documents of one prompt, those that share most words with the question (default: 3)"
    check.add_argument("--per-prompt", type=_count, default=3, metavar="N", help=text)
    check.add_argument("--most", type=_count, default=50, metavar="N", help="questions that are asked (default: 50)")
    check.add_argument("--threads", type=_count, default=1, metavar="N", help="threads that compute (default: 1)")
    check.add_argument("--json", action="store_true", help="one line of JSON")
    check.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> int:
    from kvferry.blend.check import CheckOptions, run_check

    options = CheckOptions(
        model=arguments.model,
        documents=arguments.documents,
        questions=arguments.questions,
        header=arguments.header,
        config=arguments.config,
        per_prompt=arguments.per_prompt,
        most=arguments.most,
        threads=arguments.threads,
        as_json=arguments.json,
    )
    return run_check(options, terminal())


def _commands(arguments: argparse.Namespace) -> "BlendCommands":
    from kvferry.blend.commands import BlendCommands

    return BlendCommands(router_url(arguments), terminal(), arguments.json, router_trust(arguments))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)
