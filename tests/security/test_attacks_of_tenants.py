"""What a tenant, or somebody without a key, can do to others by the router: all of it where no keys are configured,
none of it where there are."""

import asyncio
import os
import re
import statistics
import sys
import time
from pathlib import Path

import aiohttp
import pytest
from support.cluster import ClusterHandle, cluster
from support.tenant_attacks import NEVER_WORK, PROMPT, WORK_WHERE_IT_IS_OPEN, Attacker

from kvcore.tenants.keys import KeyFile, KeyRing, new_key

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tenants.md").read_text()
BLOCKS = dict(re.findall(r"<!-- runs: (tenants\w*) -->\n```bash\n(.*?)```", PAGE, re.S))
PUBLIC = "You are a helpful assistant of a company that sells ferries. " * 8
TAIL = "This is the tenant's own question, and of nobody's business but its own. " * 8
NAMES = {attack.__name__ for attack in WORK_WHERE_IT_IS_OPEN}


async def shell(commands: str, folder: Path) -> str:
    """What they print, as the page has them; all have to succeed."""
    own = folder / "bin"
    own.mkdir(exist_ok=True)
    (own / "kvferry").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvferry "$@"\n')
    (own / "kvferry").chmod(0o755)
    process = await asyncio.create_subprocess_exec(
        "bash", "-euo", "pipefail", "-c", commands, cwd=folder,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{own}:{os.environ['PATH']}"},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def tried(handle: ClusterHandle, key: str, victims_key: str) -> set[str]:
    victim = {"Authorization": f"Bearer {victims_key}"} if victims_key else {}
    async with aiohttp.ClientSession() as session:
        body = {"model": "sim", "prompt": PROMPT, "max_tokens": 1}
        for _ in range(2):
            async with session.post(handle.url + "/v1/completions", json=body, headers=victim) as reply:
                answer = await reply.json()
                assert reply.status == 200, answer
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"], "the victim has its own cache"
        it = Attacker(handle.url, session, key, answer, handle.nodes[0])
        return {attack.__name__ for attack in (*NEVER_WORK, *WORK_WHERE_IT_IS_OPEN) if await attack(it)}


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_without_keys_all_of_it_works(tmp_path):
    async with cluster(tmp_path, prefillers=1, decoders=1) as handle:
        assert await tried(handle, "", "") == NAMES


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_with_keys_none_of_it_works_and_the_commands_of_the_page_do(tmp_path):
    await shell(BLOCKS["tenants"].replace(" --requests-per-minute 600", ""), tmp_path)
    ops, acme = ((tmp_path / f"{name}.key").read_text().strip() for name in ("ops", "acme"))
    other = (await shell("kvferry keys create other --file keys.json", tmp_path)).strip()
    (tmp_path / "system.txt").write_text(PUBLIC)
    overrides = [f"security.secret.file={tmp_path}/secret", f"security.keys.file={tmp_path}/keys.json"]
    overrides.append(f"security.keys.public=[{{file: {tmp_path}/system.txt}}]")
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=overrides, key=ops) as handle:
        used = await shell(BLOCKS["tenants_use"].replace("http://127.0.0.1:8000", handle.url), tmp_path)
        assert '"usage"' in used and "prefill-0" in used
        status = f"kvferry status --json --router {handle.url} --metadata {handle.metadata_url} || true"
        assert '"uptime_s"' in await shell(f"KVFERRY_API_KEY={ops} {status}", tmp_path)
        assert '"uptime_s"' not in await shell(status, tmp_path)

        async def refused() -> bool:
            status, _, _ = await post(handle, acme)
            return status == 401

        await handle.until(refused, 60)
        again = (await shell("kvferry keys create acme --file keys.json", tmp_path)).strip()

        async def taken() -> bool:
            return (await post(handle, again))[0] == 200

        await handle.until(taken, 60)
        mine = [await cached(handle, again, PUBLIC + tail) for tail in (TAIL, TAIL)]
        assert mine[1] > len(PUBLIC) > 0, "a tenant has all of its own"
        assert await cached(handle, other, PUBLIC + TAIL) == len(PUBLIC) // 64 * 64, "and another what is public"
        assert await cached(handle, other, PUBLIC[:-64] + TAIL) == len(PUBLIC) // 64 * 64 - 64
        assert await tried(handle, other, again) == set()
        assert await tried_without(handle, again) == set()
    logs = "".join(log.read_text() for log in (tmp_path / "logs").glob("*.log"))
    assert "tenant=acme" in logs
    assert not [key for key in (ops, acme, other, again) if key.split("_", 2)[2] in logs]


async def cached(handle: ClusterHandle, key: str, prompt: str) -> int:
    """Of the prompt's tokens, which are its bytes, once what was asked before lies in the store."""
    body = {"model": "sim", "prompt": prompt, "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"}
    url = handle.url + "/v1/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as reply:
        answer = await reply.json()
        assert reply.status == 200, answer
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


async def post(handle: ClusterHandle, key: str) -> tuple[int, dict[str, str], object]:
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "sim", "prompt": [5], "max_tokens": 1}
    async with (
        aiohttp.ClientSession() as session,  # that has nothing but the key
        session.post(handle.url + "/v1/completions", json=body, headers=headers) as reply,
    ):
        return reply.status, dict(reply.headers), await reply.json()


async def tried_without(handle: ClusterHandle, victims_key: str) -> set[str]:
    """By somebody without any key, once its address is listened to again."""

    async def heard() -> bool:
        return (await post(handle, victims_key))[0] == 200

    await handle.until(heard, 60)
    return await tried(handle, "", victims_key)


def test_how_long_a_wrong_key_takes_tells_nothing_of_how_near_it_is():
    """By turns, so that whatever else the machine does meets all of them."""
    made = [new_key(f"t{n}", admin=False, created="") for n in range(50)]
    ring, key = KeyRing(KeyFile(keys=[record for _, record in made])), made[7][0]
    flip = {"a": "b"}
    wrong = {
        "all but the last": key[:-1] + flip.get(key[-1], "a"),
        "the id alone": key[:17] + "z" * 43,
        "nothing": "kvf_" + "0" * 12 + "_" + "z" * 43,
    }

    def measured() -> dict[str, float]:
        times: dict[str, list[int]] = {name: [] for name in wrong}
        for _ in range(3000):
            for name, one in wrong.items():
                began = time.perf_counter_ns()
                assert ring.find(one) is None
                times[name].append(time.perf_counter_ns() - began)
        return {name: statistics.median(taken) for name, taken in times.items()}

    def tells_nothing(middle: dict[str, float]) -> bool:
        near, none = middle["all but the last"], middle["the id alone"]
        return abs(near - none) < 0.2 * none and abs(middle["nothing"] - none) < 1.0 * none

    tries = [measured()]  # what a key's nearness makes of the time it makes each time; a busy machine does not
    while not tells_nothing(tries[-1]) and len(tries) < 5:
        tries.append(measured())
    assert tells_nothing(tries[-1]), tries
