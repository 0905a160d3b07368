"""Secrets, API keys, prompts and answers are in no log, record, metric, error or dump: a cluster is given canaries,
made to fail in as many ways as there are at hand, and all that it wrote and said is searched for them."""

import asyncio
import base64
import json
import os
import random
import re
import signal
import string
import subprocess
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec
import pytest
from support.attacks import secret_override
from support.cluster import ClusterHandle, cluster

from kvcore.tenants.keys import KeyFile, new_key
from kvcore.trust.secret_text import parse_secrets

WORDS = "".join(random.Random(5).choices(string.ascii_lowercase, k=160))
"""A prompt's text."""
IDS = random.Random(6).sample(range(3, 250), k=200)
"""A prompt's tokens."""
SALT = "the-salt-of-a-client-" + "".join(random.Random(7).choices(string.ascii_lowercase, k=20))
WRONG_KEY = "kvf_0123456789ab_" + "".join(random.Random(8).choices(string.ascii_letters, k=43))


@dataclass
class Canaries:
    """What is searched for, by name."""

    patterns: dict[str, re.Pattern[str]] = field(default_factory=dict)

    def add_text(self, name: str, text: str) -> None:
        """Any 16 characters of it in a row, and the whole in hex and base64."""
        raw = text.encode()
        forms = [text[at : at + 16] for at in range(len(text) - 15)]
        forms += [raw.hex(), base64.b64encode(raw).decode().rstrip("=")[:-2]]
        self.patterns[name] = re.compile("|".join(map(re.escape, forms)))

    def add_bytes(self, name: str, raw: bytes) -> None:
        """In hex, and as Python shows bytes."""
        forms = raw.hex(), raw.hex().upper(), repr(raw)[2:-1]
        self.patterns[name] = re.compile("|".join(map(re.escape, forms)))

    def add_tokens(self, name: str, tokens: list[int]) -> None:
        """Any six of them in a row, as a list, and as bytes in hex."""
        runs = [tokens[at : at + 6] for at in range(len(tokens) - 5)]
        forms = [r"\b" + r"\D{1,3}".join(map(str, run)) + r"\b" for run in runs]
        self.patterns[name] = re.compile("|".join(forms))

    def seen_in(self, texts: dict[str, str]) -> list[tuple[str, str]]:
        """(which, where)."""
        return [
            (name, where) for name, one in self.patterns.items() for where, text in texts.items() if one.search(text)
        ]


def test_the_search_finds_what_is_there():
    canaries = Canaries()
    canaries.add_text("text", WORDS)
    canaries.add_bytes("bytes", b"\x00\xff" * 16)
    canaries.add_tokens("tokens", IDS)
    held = [f"x{WORDS[90:]}", WORDS.encode().hex(), base64.b64encode(WORDS.encode()).decode()]
    held += [repr(b"\x00\xff" * 16), (b"\x00\xff" * 16).hex(), f"prompt={IDS}", " ".join(map(str, IDS[50:60]))]
    found = [name for text in held for name, _ in canaries.seen_in({"": text})]
    assert found == ["text"] * 3 + ["bytes"] * 2 + ["tokens"] * 2
    assert not canaries.seen_in({"": "1, 2, 3 nothing of it"})


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_no_secret_no_key_and_no_prompt_is_ever_written_or_said(tmp_path):
    canaries, (ops, acme) = Canaries(), keys(tmp_path)
    overrides = [secret_override(tmp_path), f"security.keys.file={tmp_path}/keys.json", "service.log_level=debug"]
    async with cluster(tmp_path, prefillers=1, decoders=2, overrides=overrides, key=ops) as handle:
        text = (tmp_path / "secret").read_text().strip()
        canaries.add_text("secret", text)
        canaries.add_bytes("secret's bytes", parse_secrets(text)[0])
        for name, key in (("admin's key", ops), ("tenant's key", acme), ("wrong key", WRONG_KEY)):
            canaries.add_text(name, key.split("_", 2)[2])
        canaries.add_text("prompt", WORDS)
        canaries.add_tokens("tokens", IDS)
        canaries.add_text("salt", SALT)
        async with aiohttp.ClientSession() as session:
            client = Client(handle, acme, session)
            for number, prompt in enumerate((WORDS, IDS)):
                canaries.add_tokens(f"answer {number}", await client.answered(prompt))
            await client.provoke()
            await client.come_as_a_stranger()
            await client.break_streams()
            await handle.until(handle.all_ready, 60)
        said = {f"refusal {number}": one for number, one in enumerate(client.said)} | await shown(handle, ops)
        dumped = processes(handle)
        said |= {f"command line of {pid}": command_line(pid) for pid in dumped}
        logs = await dumps(handle, tmp_path / "logs", dumped)
    assert "tenant=acme" in logs["router.log"]
    assert {"invalid_api_key", "proof_refused", "admin_key_needed"} <= {code for code in CODES if code in str(said)}
    assert canaries.seen_in(said | logs) == []


CODES = ("invalid_api_key", "proof_refused", "admin_key_needed")


def keys(folder: Path) -> tuple[str, str]:
    """An admin's and a tenant's."""
    made = [new_key(tenant, admin=tenant == "ops", created="") for tenant in ("ops", "acme")]
    (folder / "keys.json").write_bytes(msgspec.json.encode(KeyFile(keys=[record for _, record in made])))
    (folder / "keys.json").chmod(0o600)
    return made[0][0], made[1][0]


@dataclass
class Client:
    """Of the tenant. `said`: what it was told that went wrong."""

    handle: ClusterHandle
    key: str
    session: aiohttp.ClientSession
    said: list[str] = field(default_factory=list)

    async def call(self, path: str, body: object, *, key: str | None = None, url: str = "", **headers: str) -> int:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {key or self.key}"} | headers
        async with self.session.post((url or self.handle.url) + path, data=raw, headers=given) as reply:
            self.said.append(f"{reply.status} {dict(reply.headers)} {(await reply.read()).decode(errors='replace')}")
            return reply.status

    async def answered(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a whole answer, twice asked for, so that chunks move."""
        body = {"model": "sim", "prompt": prompt, "max_tokens": 12, "return_token_ids": True, "cache_salt": SALT}
        headers = {"Authorization": f"Bearer {self.key}"}
        for _ in range(2):
            async with self.session.post(self.handle.url + "/v1/completions", json=body, headers=headers) as reply:
                answer = await reply.json()
                assert reply.status == 200, answer
        return list(answer["choices"][0]["token_ids"])

    async def provoke(self) -> None:
        """Refusals of all kinds that a request can get."""
        good = {"model": "sim", "prompt": WORDS, "max_tokens": 4, "cache_salt": SALT}
        wrong: list[object] = [
            json.dumps(good).encode()[:-1],
            b"\xff" + json.dumps(good).encode(),
            [WORDS],
            good | {"max_tokens": WORDS},
            good | {"temperature": IDS},
            good | {"prompt": {WORDS: IDS}},
            good | {"prompt": [*IDS, -1]},
            good | {"prompt": [*IDS, 1 << 40]},
            good | {"prompt": [*IDS, WORDS]},
            good | {"prompt": WORDS * 2000},
            good | {"prompt": "\ud800" + WORDS},
            good | {"cache_salt": SALT * 1000},
            good | {"cache_salt": [SALT]},
            good | {"stop": [WORDS, 5]},
            good | {"stop": [WORDS] * 100},
            good | {"model": "another"},
            good | {"logit_bias": {WORDS: 3}},
            good | {"prompt": ""},
        ]
        chats: list[object] = [
            [{"role": [WORDS], "content": WORDS}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": WORDS}}]}],
            [{"role": "user", "content": {WORDS: WORDS}}],
            [{"role": "user", "content": WORDS, "tool_calls": [{"function": WORDS}]}],
            WORDS,
        ]
        statuses = [await self.call("/v1/completions", body) for body in wrong]
        chat = {"model": "sim", "max_tokens": 4}
        statuses += [await self.call("/v1/chat/completions", chat | {"messages": one}) for one in chats]
        statuses += [
            await self.call("/v1/completions", good, key=WRONG_KEY),
            await self.call("/v1/completions", good, **{"X-Api-Key": WRONG_KEY}),
            await self.call("/v1/completions", good, **{"Content-Encoding": "gzip"}),
            await self.call("/v1/cache/lookup", good),
            await self.call(f"/v1/none?api_key={self.key}&prompt={WORDS}", good),
            await self.call("/v1/completions", b"{}" * 8_000_000),
        ]
        assert min(statuses) >= 400, str(statuses)

    async def come_as_a_stranger(self) -> None:
        """To whom nothing is proved, and with a proof, but nonsense; with the prompt in what it says."""
        own = {"Accept": "application/json", "Content-Type": "application/msgpack"}
        body = msgspec.msgpack.encode({"prompt_token_ids": IDS, "id": "x", "salt": SALT, "text": WORDS})
        nodes = [
            (self.handle.node_url(name), ("/v1/prefill", "/v1/generate", "/v1/probe")) for name in self.handle.nodes
        ]
        for url, paths in [*nodes, (self.handle.metadata_url, ("/v1/objects/match", "/v1/nodes/register"))]:
            for path in paths:
                for raw in (body, body[:-3]):
                    assert await self.call(path, raw, url=url, **own) == 401
                    async with self.handle.session.post(url + path, data=raw, headers=own) as reply:
                        self.said.append(str(await reply.read()))
                        assert reply.status >= 400

    async def break_streams(self) -> None:
        """Clients that leave, and decoders that die, in mid-answer."""
        body = {"model": "sim", "prompt": WORDS, "max_tokens": 3000, "stream": True, "cache_salt": SALT}
        headers = {"Authorization": f"Bearer {self.key}"}
        async with AsyncExitStack() as open_ones:
            replies = []
            for prompt in (WORDS, WORDS[1:], IDS, IDS[1:], WORDS[2:], IDS[2:]):
                asked = self.session.post(
                    self.handle.url + "/v1/completions", json=body | {"prompt": prompt}, headers=headers
                )
                replies.append(await open_ones.enter_async_context(asked))
                assert replies[-1].status == 200 and await replies[-1].content.readline()
            for reply in replies[:2]:
                reply.close()
            for pid in processes(self.handle):
                os.kill(pid, signal.SIGUSR1)
            killed = {decoder: self.handle.launcher.pids[decoder] for decoder in self.handle.nodes[1:]}
            for pid in killed.values():
                os.kill(pid, signal.SIGKILL)
            await self.handle.until(self.has_retried, 60)
        for decoder, pid in killed.items():
            await self.handle.launcher.wait_restarted(decoder, pid, 60)

    async def has_retried(self) -> bool:
        async with self.handle.session.get(self.handle.url + "/v1/requests") as reply:
            return any(record["retries"] for record in (await reply.json())["requests"])


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def processes(handle: ClusterHandle) -> list[int]:
    """All of the cluster's, engines' too, but those that only watch another one."""
    found = list(handle.launcher.pids.values())
    for pid in found:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return [pid for pid in found if "--watch" not in command_line(pid)]


async def dumps(handle: ClusterHandle, folder: Path, pids: list[int]) -> dict[str, str]:
    """The logs, once each process has written its state into one."""

    def read() -> dict[str, str]:
        return {file.name: file.read_text(errors="replace") for file in folder.iterdir()}

    def num() -> int:
        return sum(log.count(" dump_end") for log in read().values())

    before = num()
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)

    async def written() -> bool:
        return num() >= before + len(pids)

    await handle.until(written, 60)
    return read()


async def shown(handle: ClusterHandle, key: str) -> dict[str, str]:
    """All that a cluster says of itself to an admin."""
    paths = ["/v1/requests", "/v1/cluster", "/v1/cache/stats", "/v1/cache/generations", "/v1/nodes", "/v1/janitor"]
    urls = [handle.url + path for path in paths]
    places = [handle.metadata_url, *map(handle.node_url, handle.nodes)]
    urls.append(f"{handle.url}/metrics")
    urls += [f"{handle.metadata_url}/v1/{what}" for what in ("stats", "nodes", "cache/pins")]
    urls += [f"{handle.node_url(name)}/v1/info" for name in handle.nodes]
    found = {}
    async with aiohttp.ClientSession() as anybody:
        for place in places:
            async with anybody.get(f"{place}/metrics") as reply:
                found[f"{place}/metrics"] = await reply.text()
    for url in urls:
        async with handle.session.get(url, headers={"Accept": "application/json"}) as reply:
            found[url] = (await reply.read()).decode(errors="replace")
    records = json.loads(found[handle.url + "/v1/requests"])["requests"]
    for record in records:
        found[record["id"]] = json.dumps(await handle.explain(record["id"]))
    status = [sys.executable, "-m", "kvferry", "status", "--router", handle.url, "--metadata", handle.metadata_url]
    process = await asyncio.create_subprocess_exec(
        *status, env=os.environ | {"KVFERRY_API_KEY": key}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = await process.communicate()
    found["kvferry status"] = out.decode()
    return found
