"""Secret, certificates and their CA, and the router's certificate are all changed under load: no request is lost."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from support.attacks import secret_override
from support.certificates import cluster_certificates, self_signed, tls_section
from support.cluster import ClusterHandle, cluster

from kvferry.secret import run_new

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
SEEN_S = 60.0
"""A loaded machine's processes look each second, and are late."""


class Load:
    """Requests without pause, some of them many at once, each over a connection of its own."""

    def __init__(self, handle: ClusterHandle) -> None:
        self.handle = handle
        self.statuses: list[int | str] = []
        self.over = asyncio.Event()

    async def run(self, seed: int) -> None:
        """Until it is over."""
        while not self.over.is_set():
            await self.ask(seed * 100_003 + len(self.statuses))

    async def ask(self, number: int) -> None:
        """One request, of a prompt that nobody has asked."""
        prompt = [3 + (number * 31 + at) % 20_000 for at in range(150)]
        body = {"model": "sim", "prompt": prompt, "max_tokens": 4}
        connector = aiohttp.TCPConnector(ssl=False, force_close=True)  # whichever it has: a handshake each
        try:
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.post(f"{self.handle.url}/v1/completions", json=body) as reply,
            ):
                self.statuses.append(reply.status if b"usage" in await reply.read() else "no answer")
        except (aiohttp.ClientError, OSError) as error:
            self.statuses.append(repr(error))

    async def burst(self) -> None:
        """More at once than there are connections to nodes: some are made now."""
        await asyncio.gather(*(self.ask(1_000_000 + 977 * at + len(self.statuses)) for at in range(24)))


def put(source: Path, target: Path) -> None:
    """In one step, as programs that renew certificates do."""
    shutil.copy(source, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


def put_all(source: Path, target: Path, *kinds: str) -> None:
    """The certificates and keys of all processes."""
    for kind in kinds:
        for file in source.glob(f"*.{kind}"):
            if file.stem != "ca":
                put(file, target / file.name)


async def test_all_that_is_trusted_is_changed_under_load_and_no_request_is_lost(tmp_path):
    certs, new, site, renewed = (tmp_path / name for name in ("certs", "new", "site", "renewed"))
    cluster_certificates(certs)
    cluster_certificates(new)
    for folder in (site, renewed):
        folder.mkdir()
        self_signed(folder)
    overrides = [secret_override(tmp_path), f"security.tls={tls_section(certs)}"]
    overrides.append(f"router.tls={{cert: {site / 'cert.pem'}, key: {site / 'key.pem'}}}")
    old_ca, new_ca = (certs / "ca.pem").read_bytes(), (new / "ca.pem").read_bytes()
    async with cluster(tmp_path, overrides=overrides, prefillers=1, decoders=1) as handle:
        logs = [tmp_path / "logs" / f"{name}.log" for name in ("metadata-server", "router", "prefill-0", "decode-0")]
        load = Load(handle)

        async def taken(change: Callable[[], None], event: str, where: list[Path] = logs) -> None:
            """The change is made, all take it up, and connections are made after that."""
            before = [log.read_text().count(event) for log in where]
            change()

            async def by_all() -> bool:
                return all(log.read_text().count(event) > count for log, count in zip(where, before, strict=True))

            await handle.until(by_all, SEEN_S)
            await load.burst()

        await _under_load(
            load,
            lambda: taken(lambda: run_new(tmp_path / "secret", rotate=True), "secret_reloaded", logs[2:]),
            lambda: taken(lambda: cluster_certificates(certs) and None, "certificate_reloaded"),
            lambda: taken(lambda: _write(certs / "ca.pem", old_ca + new_ca), "certificate_reloaded"),
            lambda: taken(lambda: put_all(new, certs, "key", "pem"), "certificate_reloaded"),
            lambda: taken(lambda: _write(certs / "ca.pem", new_ca), "certificate_reloaded"),
            lambda: taken(
                lambda: [put(renewed / name, site / name) for name in ("cert.pem", "key.pem")] and None,
                f"certificate_reloaded cert={site}",
                [logs[1]],
            ),
            lambda: taken(lambda: run_new(tmp_path / "secret", rotate=True), "secret_reloaded", logs[2:]),
        )
    assert set(load.statuses) == {200}, [one for one in load.statuses if one != 200]
    assert len(load.statuses) > 7 * 24
    assert not [log.name for log in logs if "state=failed" in log.read_text()]


def _write(path: Path, data: bytes) -> None:
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


async def _under_load(load: Load, *steps: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for seed in range(3):
            tasks.create_task(load.run(seed))
        try:
            for step in steps:
                await step()
        finally:
            load.over.set()
