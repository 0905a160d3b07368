"""A router over HTTPS: our own commands know its certificate, which is renewed under load, and no request is lost."""

import asyncio
import subprocess
import sys

import aiohttp
import pytest
from support.attacks import secret_override
from support.certificates import self_signed
from support.cluster import cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


async def test_a_certificate_is_renewed_under_load_and_no_request_is_lost(tmp_path):
    (tmp_path / "new").mkdir()
    cert, key = self_signed(tmp_path)
    renewed = self_signed(tmp_path / "new")
    overrides = [secret_override(tmp_path), f"router.tls={{cert: {cert}, key: {key}}}"]
    async with cluster(tmp_path, overrides=overrides, prefillers=1, decoders=1) as handle:
        assert handle.url.startswith("https://")
        body = {"model": "sim", "prompt": list(range(3, 80)), "max_tokens": 2}
        log = tmp_path / "logs" / "router.log"

        async def ask() -> int:
            connector = aiohttp.TCPConnector(ssl=False, force_close=True)  # whichever it has: a handshake each
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.post(f"{handle.url}/v1/completions", json=body) as reply,
            ):
                return reply.status

        statuses = await asyncio.gather(*(ask() for _ in range(4)))
        for path, new in zip((cert, key), renewed, strict=True):
            path.write_bytes(new.read_bytes())
            statuses += await asyncio.gather(*(ask() for _ in range(8)))

        async def is_renewed() -> bool:
            statuses.append(await ask())
            return "certificate_reloaded" in log.read_text()

        await handle.until(is_renewed, 60)
        statuses += await asyncio.gather(*(ask() for _ in range(8)))
        assert set(statuses) == {200}
        config = ["--config", str(tmp_path / "cluster.yaml")]
        text = (tmp_path / "cluster.yaml").read_text()
        text += f"\nsecurity: {{secret: {{file: {tmp_path / 'secret'}}}}}\n"
        text = text.replace("router:\n", f"router:\n  tls: {{cert: {cert}, key: {key}}}\n")
        (tmp_path / "cluster.yaml").write_text(text)
        for command in (["status"], ["nodes", "ls"], ["nodes", "drain", "prefill-0"]):
            name, *more = command
            words = [sys.executable, "-P", "-m", "kvferry", name, *(more[:1]), *config, *more[1:]]
            done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
