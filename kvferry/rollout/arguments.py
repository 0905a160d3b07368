"""The command line of `kvferry rollout`. Imports nothing heavy: what does the work is imported when it is asked for."""

import argparse
from collections.abc import Callable
from pathlib import Path

from kvferry.router_url import seconds, terminal, url_that_answers


def add_rollout(parser: argparse.ArgumentParser, config_type: Callable[[str], Path]) -> None:
    """Its arguments."""
    text = "the cluster file to go by; with --back any file of the cluster, or none"
    parser.add_argument("file", type=config_type, nargs="?", metavar="FILE", help=text)
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help="override one config value"
    )
    parser.add_argument("--back", action="store_true", help="return to what the last rollout began with")
    parser.add_argument("--dry-run", action="store_true", help="only say what would change, process by process")
    text = "so many nodes at most are away at the same time (default: 1)"
    parser.add_argument("--max-unavailable", type=_count, default=1, metavar="N", help=text)
    parser.add_argument("--all", action="store_true", help="start every process anew, though nothing of it changes")
    text = "the file by which the cluster runs now, where no `kvferry up` on this machine knows it"
    parser.add_argument("--config", type=config_type, metavar="FILE", help=text)
    parser.add_argument("--url", help="of the router, instead of the address in the file")
    text = "what runs on a node has so long to end there (default: router.request_timeout_s)"
    parser.add_argument("--drain", type=seconds, metavar="TIME", help=text)
    text = "a process has so long to come up (default: service.start_s)"
    parser.add_argument("--start", type=seconds, metavar="TIME", help=text)
    text = "how a process is started anew where `kvferry up` does not: 'ssh {host} systemctl restart kvferry-{node}'"
    parser.add_argument("--restart", default="", metavar="COMMAND", help=text)
    parser.set_defaults(command=_rollout)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of nodes")
    return int(text)


def _rollout(given: argparse.Namespace) -> int:
    from kvcore.config.file import load_config
    from kvcore.errors import ConfigError
    from kvcore.trust.opening import open_trust, trust_source
    from kvferry.rollout.command import RolloutCommand, RolloutOptions
    from kvferry.rollout.limits import RolloutLimits
    from kvferry.rollout.record import as_path, only_record

    file = given.file
    if file is None and not given.back:
        raise ConfigError("give the cluster file to roll out, or --back")
    file = as_path(only_record().before) if file is None else file
    config = load_config(file, given.overrides)
    options = RolloutOptions(
        file=file,
        overrides=given.overrides,
        running=given.config,
        url=(given.url or url_that_answers(config)).rstrip("/"),
        trust=open_trust(trust_source(config)),
        limits=RolloutLimits(
            drain_s=given.drain or config.router.request_timeout_s, start_s=given.start or config.service.start_s
        ),
        at_once=given.max_unavailable,
        back=given.back,
        dry_run=given.dry_run,
        restart=given.restart,
        again=given.all,
    )
    return RolloutCommand(options, terminal()).run()
