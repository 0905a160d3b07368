"""The command line: parses, then hands over. Each command has a module of its own, imported when it is asked for."""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvcore.errors import ConfigError
from kvcore.process.service import EXIT_CONFIG
from kvcore.release import release
from kvferry.blend.arguments import add_blend
from kvferry.cache.arguments import add_cache
from kvferry.janitor.arguments import add_janitor
from kvferry.keys import add_keys
from kvferry.nodes.arguments import add_node_orders, add_nodes
from kvferry.rollout.arguments import add_rollout
from kvferry.secret import add_secret

if TYPE_CHECKING:
    from kvcore.config.fields import ByteSize
    from kvcore.config.schema import ClusterConfig

Command = Callable[[argparse.Namespace], int]

EXAMPLES = Path(__file__).parent / "configs"
"""The example cluster files of this installation, README's `configs/`."""
DEFAULT_CONFIG = Path("configs/laptop.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. 2: the configuration or the machine is not fit (said on stderr)."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    command: Command | None = arguments.command
    if command is None:
        parser.print_help()
        return 0
    try:
        return command(arguments)
    except ConfigError as error:
        sys.stderr.write(f"kvferry: error: {error}\n")
        return EXIT_CONFIG


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands, for `main` and for tests of the documentation."""
    parser = argparse.ArgumentParser(prog="kvferry", description="Prefill and decode on separate machines, one cache.")
    parser.add_argument("--version", action="version", version=_version())
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    up = _command(commands, "up", _up, "run a whole cluster on this machine until Ctrl-C")
    up.add_argument("config", type=cluster_file, metavar="CONFIG")
    _add_set(up)
    up.add_argument("--log-dir", type=Path, help="default: ~/.local/state/kvferry/CLUSTER")
    _add_serve(_command(commands, "serve", _serve, "serve one model on this machine until Ctrl-C, without a file"))
    _add_config(_command(commands, "config", None, "make a part of a cluster file from another program's"))
    text = "look at the cache of a running cluster, and give orders about it"
    add_cache(_command(commands, "cache", None, text), cluster_file)
    text = "what the reuse of documents costs: on your own, and in a running cluster; and orders about it"
    add_blend(_command(commands, "blend", None, text), cluster_file)
    text = "look at the nodes of a running cluster, drain them, and forget those that are gone"
    add_nodes(_command(commands, "nodes", None, text), cluster_file)
    add_node_orders(commands, cluster_file)
    text = "bring a running cluster to another cluster file, a process at a time, and back"
    add_rollout(_command(commands, "rollout", None, text), cluster_file)
    text = "make the secret by which the processes of a cluster know each other"
    add_secret(_command(commands, "secret", None, text))
    text = "say what a running cluster keeps for nodes and clients that are gone; changes nothing without --apply"
    add_janitor(_command(commands, "janitor", None, text), cluster_file)
    text = "make, show and revoke the API keys of a router's tenants"
    add_keys(_command(commands, "keys", None, text), cluster_file)
    status = _command(commands, "status", _status, "show nodes, segments, requests and hit rate of a running cluster")
    status.add_argument(
        "--config", type=cluster_file, help=f"where the addresses are (default: {DEFAULT_CONFIG}, if it exists)"
    )
    status.add_argument("--router", metavar="URL", help="instead of the address in the config")
    status.add_argument("--metadata", metavar="URL", help="instead of the address in the config")
    status.add_argument("--json", action="store_true", help="one line of JSON")
    doctor = _command(commands, "doctor", _doctor, "say what would keep a cluster from running on this machine")
    doctor.add_argument("config", type=cluster_file, metavar="CONFIG")
    _add_set(doctor)
    doctor.add_argument(
        "--probe", action="store_true", help="instead: measure latency and bandwidth between the nodes that run now"
    )
    _command(commands, "prepare-demo-model", _prepare, "make the demo model's folder, once")
    demo = _command(commands, "demo", _demo, "bring a cluster up and chat with it over a long document, twice")
    demo.add_argument("config", type=cluster_file, nargs="?", default=str(DEFAULT_CONFIG), metavar="CONFIG")
    _add_set(demo)
    demo.add_argument("--log-dir", type=Path)
    demo.add_argument("--once", action="store_true", help="end afterwards, with a RESULT line")
    _add_rag(_command(commands, "rag", None, "ask about a folder of texts, whose passages are reused as documents"))
    return parser


def cluster_file(given: str) -> Path:
    """The file that is meant. `configs/laptop.yaml`, where there is no such file, is the installation's example."""
    file = Path(given)
    shipped = EXAMPLES / file.name
    is_example = file.parts == ("configs", file.name) and not file.exists() and shipped.is_file()
    return shipped if is_example else file


def _version() -> str:
    return f"kvferry {release() or '(not installed: run from its sources)'}"


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Command | None, help_text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(command=run)
    return parser


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help="override one config value"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="FROM", required=True)
    text = "say what each key of an LMCache file becomes, under LMCACHE_* of the environment"
    _command(kinds, "from-lmcache", _from_lmcache, text).add_argument("file", type=Path, metavar="FILE")


def _add_rag(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    text = "bring a cluster up that reuses documents, and ask it about the texts of a folder"
    demo = _command(kinds, "demo", _rag_demo, text)
    demo.add_argument("folder", type=Path, metavar="FOLDER")
    demo.add_argument("config", type=cluster_file, nargs="?", default=str(DEFAULT_CONFIG), metavar="CONFIG")
    _add_set(demo)
    text = "repeat it for more of them (default: the lines of stdin)"
    demo.add_argument("--question", action="append", default=[], dest="questions", help=text)
    demo.add_argument("--passages", type=int, default=3, metavar="N", help="of one question (default: 3)")


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("model", help="a folder in Hugging Face format, or a hub id such as Qwen/Qwen3-8B")
    serve.add_argument("--colocated", action="store_true", help="one engine with the cache, not prefiller and decoder")
    serve.add_argument("--port", type=int, default=8000, help="of the OpenAI API (default: 8000)")
    serve.add_argument("--engine", choices=("vllm", "torch"), help="default: vllm if it can run here")
    serve.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: by the hardware")
    serve.add_argument("--max-context", type=int, metavar="TOKENS", help="lower than the model's own, to save memory")
    serve.add_argument("--kv-cache", type=_size, metavar="SIZE", help="KV of running requests, of each engine")
    serve.add_argument("--segment", type=_size, metavar="SIZE", help="each node's share of the store")
    serve.add_argument(
        "--tier",
        action="append",
        default=[],
        metavar="TIER",
        help="where chunks are kept beyond memory: disk:PATH:SIZE (of each node), redis://HOST:PORT, "
        "s3://BUCKET/PREFIX, file:///FOLDER; repeat it",
    )
    serve.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="one of vLLM's own arguments; repeat it"
    )
    _add_set(serve)


def _size(text: str) -> "ByteSize":
    from kvcore.config.parse import parse_byte_size

    try:
        return parse_byte_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def _serve(arguments: argparse.Namespace) -> int:
    from kvferry.lmcache.command import from_environment
    from kvferry.serve import node_ports, parse_arguments, run_serve
    from kvferry.serve_plan import ServeOptions
    from kvferry.tier_options import parse_tiers

    options = ServeOptions(
        folder=arguments.model,
        name=arguments.model,
        dtype=arguments.dtype,
        max_context=arguments.max_context,
        colocated=arguments.colocated,
        engine=arguments.engine,
        port=arguments.port,
        node_ports=node_ports(),
        kv_cache=arguments.kv_cache,
        segment=arguments.segment,
        tiers=parse_tiers(arguments.tier),
        args=parse_arguments(arguments.arg),
    )
    return run_serve(options, arguments.overrides, from_environment(os.environ))


def _from_lmcache(arguments: argparse.Namespace) -> int:
    from kvferry.lmcache.command import run_from_lmcache

    return run_from_lmcache(arguments.file, os.environ)


def _up(arguments: argparse.Namespace) -> int:
    from kvferry.launch.up import run_up

    return run_up(arguments.config, arguments.overrides, arguments.log_dir)


def _demo(arguments: argparse.Namespace) -> int:
    from kvferry.demo.run import run_demo

    return run_demo(arguments.config, arguments.overrides, arguments.log_dir, once=arguments.once)


def _rag_demo(arguments: argparse.Namespace) -> int:
    from kvferry.rag.demo import run_rag_demo

    given = arguments
    return run_rag_demo(given.folder, given.config, given.overrides, given.questions, passages=max(1, given.passages))


def _status(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from kvcore.config.file import load_config
    from kvcore.config.schema import MetadataServerConfig, RouterConfig
    from kvcore.config.servers import operators_urls_of
    from kvcore.ports import base_url
    from kvcore.trust.opening import OPEN, open_trust, trust_source
    from kvferry.rollout.record import unfinished
    from kvferry.status import addresses, partition_urls, run_status, standbys_of

    router_url = base_url(RouterConfig().host, RouterConfig().port)
    metadata_url: str | None = base_url(MetadataServerConfig().host, MetadataServerConfig().port)
    config_file = arguments.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    standbys: list[str] = []
    partitions: dict[str, list[str]] = {}
    routers: list[str] = []
    trust, left = OPEN, ""
    if config_file is not None:
        config = load_config(config_file)
        try:
            left = unfinished(config.cluster)
        except ConfigError as error:  # no reason to show nothing of the cluster
            left = error.message
        (router_url, metadata_url), standbys = addresses(config), standbys_of(config)
        partitions = {} if arguments.metadata else partition_urls(config)
        routers = [] if arguments.router else operators_urls_of(config)[1:]
        trust = open_trust(trust_source(config))
    router_url, metadata_url = arguments.router or router_url, arguments.metadata or metadata_url
    console = Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width: tables stay on one line
    metadata_url = metadata_url.rstrip("/") if metadata_url else None
    standbys = [] if arguments.metadata else standbys
    work = run_status(
        router_url.rstrip("/"),
        metadata_url,
        standbys=standbys,
        partitions=partitions,
        routers=routers,
        trust=trust,
        as_json=arguments.json,
        console=console,
    )
    code = asyncio.run(work)
    if left and not arguments.json:
        console.print(f"problem: {left}", style="red", markup=False, soft_wrap=True)
    return code


def _doctor(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from kvcore.config.file import load_config
    from kvferry.doctor.checks import ALL_CHECKS, run_checks
    from kvferry.doctor.findings import Context, Finding
    from kvferry.doctor.running import find_running

    findings = [Finding("config", True, str(arguments.config))]
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        findings = [Finding("config", False, error.message, "correct the file, or what --set gives")]
    else:
        if arguments.probe:
            return _probe(config)
        findings += run_checks(Context(config, running=asyncio.run(find_running(config))), ALL_CHECKS)
    console = Console()
    width = max(len(finding.subject) for finding in findings) + 2
    for finding in findings:
        mark = Text("ok    ", style="green") if finding.ok else Text("wrong ", style="bold red")
        line = mark.append(Text(f"{finding.subject:<{width}}{finding.detail}", style="default"))
        console.print(line, soft_wrap=True)
        if not finding.ok:
            console.print(Text(f"      -> {finding.remedy}"), soft_wrap=True)
    return 0 if all(finding.ok for finding in findings) else 1


def _probe(config: "ClusterConfig") -> int:
    from rich.console import Console

    from kvferry.doctor.probe import run_probe

    return asyncio.run(run_probe(config, Console(width=None if sys.stdout.isatty() else 160)))


def _prepare(_: argparse.Namespace) -> int:
    from kvferry.demo.model import prepare_demo_model

    print(prepare_demo_model())
    return 0
