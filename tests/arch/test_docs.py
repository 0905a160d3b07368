"""The pages in docs/ keep what they promise: files load, commands are commands, what is shown as run runs.

`<!-- file: NAME -->` before a YAML block is a whole cluster file; `<!-- runs: up | client | parse -->` before a block
of commands says how a test takes them, as in README; `runs: cache` are run by `test_cluster_cache`.
"""

import asyncio
import json
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from support.ports import free_ports

from engines.torch.kv_cache import KVGeometry
from kvcore.config.file import load_config
from kvcore.config.schema import MetadataServerConfig, RouterConfig, StoreConfig
from kvcore.extents import ExtentAllocator, aligned
from kvcore.process.service import EXIT_CONFIG, EXIT_FAILED, EXIT_FORCED
from kvcore.types import Segment
from kvferry.cli import build_parser
from kvnode.limits import NodeLimits
from kvstore.chunk_format import HEADER_BYTES
from metadata_server.index.chunks.calls import CallCount
from metadata_server.index.chunks.orders import new_order
from metadata_server.index.chunks.rows import ReplicaTable
from metadata_server.index.chunks.rules import RoomRules
from metadata_server.index.chunks.segments import SegmentRecord
from router.nodes.limits import NodeHealthLimits
from router.requests.limits import RequestLimits

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BIN = Path(sys.executable).parent
FILE = re.compile(r"<!-- file: (\S+) -->\n```yaml\n(.*?)```", re.S)
BLOCK = re.compile(r"<!-- runs: (\w+) -->\n```bash\n(.*?)```", re.S)
PAGES_WITH_COMMANDS = ["start.md", "gateway.md", "cache.md", "operations.md"]
SHELL = {"curl", "kill", "sudo"}
ROLES = {"prefiller": "prefiller", "decoder": "decoder", "kvnode": "store"}


def pages() -> list[Path]:
    return [path for path in sorted(DOCS.rglob("*.md")) if path.name in PAGES_WITH_COMMANDS]


def commands(page: str, kind: str) -> list[str]:
    blocks = BLOCK.findall((DOCS / page).read_text())
    text = "".join(block for runs, block in blocks if runs == kind).replace("\\\n", " ")
    return [line for line in text.splitlines() if line]


def write_files(page: str, folder: Path) -> dict[str, Path]:
    """The page's cluster files, and those that the project ships."""
    found = {f"configs/{path.name}": path for path in (ROOT / "configs").glob("*.yaml")}
    texts = [(DOCS / source).read_text() for source in ("start.md", "tiers.md", page)]
    for name, text in [file for one in texts for file in FILE.findall(one)]:
        found[name] = folder / name
        found[name].write_text(text)
    return found


def check_command(line: str, files: dict[str, Path]) -> None:
    """A program of ours with arguments that it takes, a file that loads and a node that it has."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-m"]:
        words = words[2:]
        assert (ROOT / words[0] / "__main__.py").exists(), line
    elif words[0] not in SHELL:
        assert (BIN / words[0]).exists(), line
    program, *arguments = words
    if program == "kvferry":
        parsed = build_parser().parse_args(arguments)
        if getattr(parsed, "config", None) is not None:
            load_config(files[str(parsed.config)], getattr(parsed, "overrides", []))
    elif "--config" in arguments:
        config = load_config(files[arguments[arguments.index("--config") + 1]])
        if "--node" in arguments:
            name = arguments[arguments.index("--node") + 1]
            assert config.nodes[name].role == ROLES[program] if name != "NAME" else program in ROLES, line


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_files_load_and_commands_are_ones_that_we_have(page, tmp_path):
    files = write_files(page, tmp_path)
    for name, path in files.items():
        assert load_config(path).nodes, name
    for kind in ("up", "client", "parse", "cache", "nodes", "replace", "janitor", "rebalance"):
        for line in commands(page, kind):
            check_command(line, files)


def test_every_block_of_commands_says_how_it_is_run():
    for page in pages():
        assert page.read_text().count("```bash\n") == len(BLOCK.findall(page.read_text())), page.name


def test_links_lead_somewhere():
    for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_worked_example_of_sizes_is_what_the_code_computes():
    kv = KVGeometry(num_layers=36, block_size=64, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    chunk_tokens = 256
    length = aligned(HEADER_BYTES + chunk_tokens * kv.token_bytes)
    whole = Segment(id="s", node_id="n", size_bytes=64 << 30, host_id="h", addresses={})
    table, calls, rules = ReplicaTable(), CallCount(), RoomRules(high=StoreConfig().high_watermark)
    space, order = ExtentAllocator(whole.size_bytes), new_order("lru", table, calls)
    segment = SegmentRecord(whole, space, calls, table=table, order=order, rules=rules)
    chunks = 0
    while segment.allocate(length):
        chunks += 1
    page = (DOCS / "operations.md").read_text()
    for what, number in {
        "bytes a token": kv.token_bytes,
        "bytes a chunk": length,
        "chunks in the segment": chunks,
        "tokens in the segment": chunks * chunk_tokens,
    }.items():
        assert f"| {what} | {number:,} |" in page


def test_commands_within_sentences_are_ones_that_we_have(capsys):
    parser = build_parser()
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        for command in re.findall(r"`kvferry ([^`]+)`", page.read_text()):
            words = shlex.split(command)
            try:
                parser.parse_args(words if len(words) > 1 else [*words, "--help"])
            except SystemExit as ended:
                assert ended.code == 0, f"{page.name}: kvferry {command}\n{capsys.readouterr().err}"


def test_the_numbers_that_operators_are_told_are_the_codes():
    page, limits = (DOCS / "operations.md").read_text(), RequestLimits()
    assert f"for `service.start_s` (at least {limits.patience_s:.0f} s)" in page
    server = MetadataServerConfig()
    assert f"after `node_ttl_s` ({server.node_ttl_s:g} s)" in page
    node = NodeLimits()
    pauses = f"{node.engine_first_backoff_s:g} s, ever more slowly up to {node.engine_longest_backoff_s:g} s"
    assert f"starts it again after {pauses}" in page
    health, router = NodeHealthLimits(), RouterConfig()
    round_s = router.probe_interval_s + router.connect_timeout_s
    assert f"without the metadata server's word after {health.lost_rounds * round_s:g} s" in page
    assert f"`router.stall_gap_s` ({router.stall_gap_s:g} s) in a stream" in page
    assert f"`router.stall_first_s` ({router.stall_first_s:g} s) before a first token" in page
    breaker = f"none for {health.first_pause_s:g} s, ever longer up to {health.longest_pause_s:g} s"
    assert health.failures_to_open == 3 and breaker in (DOCS / "troubleshoot.md").read_text()
    codes = f"{EXIT_FAILED} failed, {EXIT_CONFIG} the configuration or the machine is not fit"
    assert codes in page and f"{EXIT_FORCED} ended at once" in page


def test_lines_fit_a_screen():
    """Rows of tables cannot be broken."""
    for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]:
        long = [n for n, line in enumerate(page.read_text().splitlines(), 1) if len(line) >= 160 and line[0] != "|"]
        assert not long, f"{page}: lines {long}"


def test_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in text]


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_the_first_cluster_comes_up_and_answers_as_the_page_says(tmp_path):
    """On ports of its own: those of the page may be taken."""
    (tmp_path / "mine.yaml").write_text(FILE.findall((DOCS / "start.md").read_text())[0][1])
    router, server, *nodes = free_ports(4)
    moved = [f"router.port={router}", f"metadata_server.port={server}"]
    moved += [
        f"nodes.{name}.{key}"
        for name, port in zip(("p0", "d0"), nodes, strict=True)
        for key in (f"port={port}", "segment=64MiB")
    ]
    overrides = " ".join(f"--set {item}" for item in moved)

    async def run(command: str) -> str:
        process = await asyncio.create_subprocess_shell(
            f"export PATH={shlex.quote(str(BIN))}:$PATH; {command}", stdout=asyncio.subprocess.PIPE, cwd=tmp_path
        )
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, f"{command}\n{output.decode()}"
        return output.decode()

    doctor, up = commands("start.md", "up")
    assert "wrong" not in await run(f"{doctor} {overrides}")
    words = shlex.split(f"{up} {overrides} --log-dir logs")
    process = await asyncio.create_subprocess_exec(
        BIN / words[0], *words[1:], cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            while b"ready: http" not in (line := await process.stdout.readline()):
                assert line, "kvferry up has ended"
        reading = asyncio.create_task(process.stdout.read())
        status, answer, record = [await run(_moved_to(line, router, server)) for line in commands("start.md", "client")]
    finally:
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 0
        await reading
    assert "p0" in status and "d0" in status
    assert json.loads(answer)["usage"]["completion_tokens"] == 8
    assert json.loads(record)["state"] == "ok"


def _moved_to(command: str, router: int, server: int) -> str:
    if command.startswith("kvferry status"):
        return f"{command} --router http://127.0.0.1:{router} --metadata http://127.0.0.1:{server}"
    return command.replace("127.0.0.1:8000", f"127.0.0.1:{router}")
