"""The check of tiers that are servers: each answers, and is set up as a cache."""

import asyncio

from kvcore.errors import ConfigError
from kvferry.doctor.findings import Context, Finding
from kvferry.machine import size_text
from kvstore.tiers.places.discovery import ServerPlace
from kvstore.tiers.places.opening import redis_servers
from kvstore.tiers.resp import RespConnection, command
from kvstore.tiers.resp_client import RespClient

_REDIS = "tiers.redis"
_REMEDY = "start it, or correct tiers.redis.url and its password; without it chunks are computed"
_POLICIES = ("allkeys-lru", "allkeys-lfu")


def check_redis(context: Context) -> list[Finding]:
    """Ask each Redis or Valkey about its memory, as a node will reach it. Blocking, `tiers.redis.timeout_s` at most,
    twice where it must be found first."""
    config = context.config.tiers.redis
    return [] if config is None else asyncio.run(_ask_all(config.url, config.timeout_s))


async def _ask_all(url: str, timeout_s: float) -> list[Finding]:
    try:
        servers = await redis_servers(url, timeout_s)
    except ConfigError as error:
        return [Finding(_REDIS, False, error.message, "correct tiers.redis.url")]
    except OSError as error:
        return [Finding(_REDIS, False, str(error) or "nobody answers in time", _REMEDY)]
    return await asyncio.gather(*(_ask(server, timeout_s) for server in servers))


async def _ask(server: ServerPlace, timeout_s: float) -> Finding:
    client, answers = RespClient(server, 1), list[object]()

    def ask(connection: RespConnection) -> None:
        connection.send([command(b"INFO")], replies=1)
        answers.append(connection.reply())

    try:
        problem = await client.run(ask, timeout_s)
    finally:
        await client.aclose()
    if not answers:
        return Finding(_REDIS, False, problem or "it did not answer", _REMEDY)
    if not isinstance(answers[0], bytes):
        return Finding(_REDIS, True, f"{problem}; its maxmemory and maxmemory-policy are not known")
    return Finding(_REDIS, True, f"{server.shown}: {_said(answers[0].decode(errors='replace'))}")


def _said(info: str) -> str:
    """What INFO says of the server as a cache, with what to change."""
    facts = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    most, policy = facts.get("maxmemory", ""), facts.get("maxmemory_policy", "not known")
    size = size_text(int(most)) if most.isdecimal() else "not known"
    warnings = []
    if most == "0":
        warnings.append("set its maxmemory, or it takes all memory of its machine")
    if policy not in _POLICIES:
        warnings.append(f"set its maxmemory-policy to {' or '.join(_POLICIES)}, or it takes no chunk when it is full")
    version = facts.get("valkey_version") or facts.get("redis_version")
    shown = f"version {version}, maxmemory {'not set' if most == '0' else size}, maxmemory-policy {policy}"
    return "; warning: ".join([shown, *warnings])
