"""The front door before vLLM servers that run already: what the doctor says, and status over a running router."""

import asyncio
import io
from pathlib import Path

import pytest
from rich.console import Console
from support.fake_vllm_server import FakeVllm, World, servers, serving
from support.plain_vllm import plain_config, running_router, write_model_folder
from support.ports import free_ports

from kvcore.config.schema import ClusterConfig
from kvcore.handoff import HandoffKind
from kvcore.types import Role
from kvferry.doctor.checks import ALL_CHECKS, preflight, run_checks
from kvferry.doctor.findings import Context
from kvferry.doctor.servers import check_servers
from kvferry.status import addresses, run_status


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


def absent(model: Path) -> ClusterConfig:
    """One decoder that does not run."""
    fake = FakeVllm("d0", Role.DECODER, World(HandoffKind.NIXL), url=f"http://127.0.0.1:{free_ports(1)[0]}")
    return plain_config({"d0": fake}, model)


def test_a_server_that_does_not_run_is_told_with_a_remedy_but_keeps_no_router_from_starting(model: Path) -> None:
    config = absent(model)
    (finding,) = check_servers(Context(config))
    assert not finding.ok and "cannot be reached" in finding.detail and "docs/plain-vllm.md" in finding.remedy
    preflight(config)


def test_a_folder_without_config_is_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((model / "tokenizer.json").read_text())
    config = absent(tmp_path)
    assert [finding.ok for finding in check_servers(Context(config))] == [False]


@pytest.mark.parametrize("kind", [HandoffKind.NIXL, HandoffKind.MOONCAKE])
async def test_all_is_well(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind)
    async with serving(fakes):
        config = plain_config(fakes, model)
        findings = await asyncio.to_thread(run_checks, Context(config, all_here=True), ALL_CHECKS)
        assert all(finding.ok for finding in findings)
        said = {finding.subject: finding.detail for finding in findings}
        assert "decoder at http://127.0.0.1" in said["server d0"] and "context 2048" in said["server d0"]
        assert ("engine-p0" in said["server p0"]) is (kind is HandoffKind.MOONCAKE)
        assert f"{kind} moves the KV" in said["transport"]
        assert "0 B of it segments" in said["memory"] and "port metadata_server" not in said
        async with running_router(config):
            router_url, metadata_url = addresses(config)
            out = io.StringIO()
            code = await run_status(router_url, metadata_url, as_json=False, console=Console(file=out, width=160))
    assert code == 0 and "p0" in out.getvalue() and f"handoff: {kind}" in out.getvalue()
