"""What somebody who reaches the router, with another tenant's API key at most, can try: programs that say whether it
worked."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

PROMPT = random.Random(9).choices(range(3, 250), k=64 * 4 + 1)
"""The victim's: four chunks, and what follows them."""


@dataclass
class Attacker:
    """`key`: of the attacker's own tenant; empty: it has none. `victim`: a request of another tenant's."""

    url: str
    session: aiohttp.ClientSession
    key: str
    victim: dict[str, Any]
    node: str

    async def call(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
        """(status, JSON) of an answer."""
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self.session.request(method, self.url + path, json=body, headers=headers) as reply:
            text = await reply.read()
            return reply.status, (await reply.json() if reply.content_type == "application/json" else text.decode())

    async def complete(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        """An answer, or the refusal."""
        body = {"model": "sim", "prompt": prompt, "max_tokens": 1, **fields}
        return dict((await self.call("POST", "/v1/completions", body))[1])

    async def raw(self, request: bytes) -> bytes:
        """What comes back for these bytes."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(request)
            await writer.drain()
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), 60)
        finally:
            writer.close()


Attack = Callable[[Attacker], Awaitable[bool]]


async def guesses_a_prompt(it: Attacker) -> bool:
    """Whether the number of cached tokens tells the right guess from a wrong one."""
    salts = [{}, {"cache_salt": "kvt1." + "0" * 32 + "." + "0" * 32}]
    seen = [await it.complete(prompt, **salt) for salt in salts for prompt in (PROMPT, [*PROMPT[1:], 5])]
    return any(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in seen if "usage" in answer)


async def sees_requests_of_others(it: Attacker) -> bool:
    """Their records, in the list or by their id."""
    _, listed = await it.call("GET", "/v1/requests")
    status, _ = await it.call("GET", f"/v1/requests/{it.victim['id']}")
    return status == 200 or any(one["id"] == it.victim["id"] for one in listed.get("requests", []))


async def watches_the_counters(it: Attacker) -> bool:
    """Of hits, by which a guess could be told from its miss."""
    paths = ("/metrics", "/load", "/v1/cluster", "/v1/cache/stats")
    return any([(await it.call("GET", path))[0] == 200 for path in paths])


async def looks_up_where_a_prompt_lies(it: Attacker) -> bool:
    """By the operators' own call."""
    return (await it.call("POST", "/v1/cache/lookup", {"prompt": PROMPT}))[0] == 200


async def drains_a_node(it: Attacker) -> bool:
    """And takes it back."""
    done = (await it.call("POST", "/v1/nodes/drain", {"node": it.node}))[0] == 200
    await it.call("POST", "/v1/nodes/undrain", {"node": it.node})
    return done


async def asks_without_a_key(it: Attacker) -> bool:
    """Of anybody's machine time."""
    body = {"model": "sim", "prompt": [5], "max_tokens": 1}
    return (await it.call("POST", "/v1/completions", body, key=""))[0] == 200


async def gets_around_the_check_by_how_the_path_is_written(it: Attacker) -> bool:
    """Whether any of these is answered with the cluster's state."""
    ways = ["/v1/cluster", "//v1/cluster", "/v1/./cluster", "/v1/models/../cluster", "/v1/requests/%2e%2e/cluster"]
    ways += [
        "/v1/cluster/",
        "/V1/CLUSTER",
        "/v1/%63luster",
        "/v1/cluster;x",
        "/v1/models/..%2fcluster",
        "http://x/v1/cluster",
    ]
    key = f"Authorization: Bearer {it.key}\r\n" if it.key else ""
    answers = [
        await it.raw(f"GET {way} HTTP/1.1\r\nHost: x\r\n{key}Connection: close\r\n\r\n".encode()) for way in ways
    ]
    return any(b'"uptime_s"' in answer for answer in answers)


async def tries_keys(it: Attacker) -> bool:
    """Whether a hundred of them were looked at. The last attack: its address is not listened to for a time."""
    keys = [f"kvf_{number:012x}_{'x' * 43}" for number in range(100)]
    body = {"model": "sim", "prompt": [5], "max_tokens": 1}
    statuses = [(await it.call("POST", "/v1/completions", body, key=key))[0] for key in keys]
    return 429 not in statuses


async def writes_a_header_into_an_answer(it: Attacker) -> bool:
    """By what an answer repeats, or by a name that is logged."""
    value = b"a\r\nX-Injected: yes"
    names = (b"X-Request-Id", b"X-KVFerry-Tenant", b"Authorization", b"X-Forwarded-For")
    found = False
    for name in names:
        for split in (value, value.replace(b"\r\n", b"\n"), value.replace(b"\r\n", b"%0d%0a"), b"a\x00X-Injected: yes"):
            answer = await it.raw(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + name + b": " + split + b"\r\n\r\n")
            head = answer.partition(b"\r\n\r\n")[0].lower()
            found |= any(line.startswith(b"x-injected") for line in head.split(b"\n"))
    return found


WORK_WHERE_IT_IS_OPEN: list[Attack] = [
    guesses_a_prompt,
    sees_requests_of_others,
    watches_the_counters,
    looks_up_where_a_prompt_lies,
    drains_a_node,
    asks_without_a_key,
    gets_around_the_check_by_how_the_path_is_written,
    tries_keys,
]
NEVER_WORK: list[Attack] = [writes_a_header_into_an_answer]
