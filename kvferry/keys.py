"""`kvferry keys create | list | revoke`: the API keys of a router's tenants, in a file that has only their hashes."""

import argparse
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from kvcore.errors import ConfigError
from kvcore.tenants.keys import (
    BadKeyFileError,
    KeyFile,
    KeyRecord,
    Priority,
    TenantLimits,
    is_tenant_name,
    new_key,
    parse_keys,
)
from kvferry.router_url import seconds
from kvferry.secret import make_like

if TYPE_CHECKING:
    from rich.table import Table

_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "cache_share", "priority", "first_token_s")


def add_keys(parser: argparse.ArgumentParser, config_type: Callable[[str], Path]) -> None:
    """Its commands, and their help."""
    commands = parser.add_subparsers(metavar="WHAT", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=run)
        made.add_argument("--config", type=config_type, help="the cluster file, whose security.keys.file is meant")
        made.add_argument("--file", type=Path, help="the file of keys itself")
        return made

    text = "make a key for a tenant, and print it: nobody can read it again"
    create = command("create", run_create, text)
    create.add_argument("tenant", metavar="TENANT", help="letters, digits, `.`, `_` and `-`")
    create.add_argument("--admin", action="store_true", help="it may give orders and see all requests")
    create.add_argument("--requests-per-minute", type=int, metavar="N", help="of the tenant, with all of its keys")
    create.add_argument("--tokens-per-minute", type=int, metavar="N", help="of prompts and completions together")
    create.add_argument("--concurrency", type=int, metavar="N", help="requests under way at a time")
    create.add_argument("--cache-share", type=float, metavar="SHARE", help="of each segment and disk; 0.25: a quarter")
    create.add_argument("--priority", choices=get_args(Priority), help="who is refused first where there is much to do")
    create.add_argument("--first-token-s", type=seconds, metavar="S", help="how long a first token may take")
    listing = command("list", run_list, "show which keys there are, whose they are and what their tenants may")
    listing.add_argument("--json", action="store_true", help="one line of JSON")
    revoke = command("revoke", run_revoke, "let a key hold no longer: routers know it within a second or two")
    revoke.add_argument("id", metavar="ID", help="as list shows it; it stands in the key behind `kvf_`")


def run_create(arguments: argparse.Namespace) -> int:
    """Prints the key alone on stdout. Raises ConfigError."""
    tenant: str = arguments.tenant
    if not is_tenant_name(tenant):
        raise ConfigError(f"{tenant!r} is no name of a tenant: letters, digits, `.`, `_` and `-`, at most 64")
    with _changing(_file_of(arguments)) as held:
        key, record = new_key(tenant, admin=arguments.admin, created=_now())
        given = {name: value for name in _LIMITS if (value := getattr(arguments, name)) is not None}
        tenants = held.file.tenants
        if given or tenant not in tenants:
            tenants = {**tenants, tenant: _limits(tenants.get(tenant, TenantLimits()), given)}
        held.file = msgspec.structs.replace(held.file, tenants=tenants, keys=[*held.file.keys, record])
    sys.stderr.write(f"{held.path}: key {record.id} of tenant {tenant}{' (admin)' if record.admin else ''}\n")
    print(key)
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """A line a key. Raises ConfigError."""
    found = _read(_file_of(arguments))
    if arguments.json:
        shown = [msgspec.to_builtins(record) for record in found.keys]
        for one in shown:
            del one["sha256"]
        print(msgspec.json.encode({"tenants": found.tenants, "keys": shown}).decode())
        return 0
    from kvferry.router_url import terminal

    terminal().print(_table(found))
    return 0


def run_revoke(arguments: argparse.Namespace) -> int:
    """Raises ConfigError where there is no such key."""
    with _changing(_file_of(arguments), must_exist=True) as held:
        at = next((at for at, one in enumerate(held.file.keys) if one.id == arguments.id), None)
        if at is None:
            raise ConfigError(f"{held.path} has no key {arguments.id}; `kvferry keys list` shows them")
        keys = list(held.file.keys)
        keys[at] = msgspec.structs.replace(keys[at], revoked=keys[at].revoked or _now())
        held.file = msgspec.structs.replace(held.file, keys=keys)
    print(f"{arguments.id} of tenant {keys[at].tenant} holds no longer")
    return 0


class _Held:
    """The file while it is changed."""

    def __init__(self, path: Path, file: KeyFile) -> None:
        self.path, self.file = path, file


@contextmanager
def _changing(path: Path, *, must_exist: bool = False) -> Iterator[_Held]:
    """Written as a whole or not at all, by one command at a time."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        with lock.open("w") as locked:
            fcntl.flock(locked, fcntl.LOCK_EX)
            held = _Held(path, _read(path) if must_exist or path.exists() else KeyFile())
            yield held
            written = path.with_name(f".{path.name}.{os.getpid()}")
            with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as out:
                if path.exists():
                    make_like(out.fileno(), path.stat())
                out.write(msgspec.json.format(msgspec.json.encode(held.file), indent=1) + b"\n")
                out.flush()
                os.fsync(out.fileno())
            written.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _read(path: Path) -> KeyFile:
    try:
        return parse_keys(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; `kvferry keys create` makes it") from error
    except BadKeyFileError as error:
        raise ConfigError(f"{path}: {error}") from None


def _file_of(arguments: argparse.Namespace) -> Path:
    if arguments.file is not None:
        return Path(arguments.file)
    if arguments.config is None:
        raise ConfigError("say where the keys are: --config CLUSTER_FILE, or --file FILE")
    from kvcore.config.file import load_config

    keys = load_config(arguments.config).security.keys
    if keys is None or keys.file is None:
        raise ConfigError(f"{arguments.config} has no security.keys.file; --file FILE names one")
    return Path(keys.file)


def _limits(before: TenantLimits, given: dict[str, Any]) -> TenantLimits:
    raw = {**msgspec.to_builtins(before), **given}
    try:
        return msgspec.convert(raw, TenantLimits)
    except msgspec.ValidationError as error:
        raise ConfigError(f"a tenant's limits: {error}") from None


def _table(file: KeyFile) -> "Table":
    from kvferry.cache.tables import table

    limits = ("requests/min", "tokens/min", "at a time", "cache", "priority", "first token")
    made = table("id", "tenant", "admin", "created", "revoked", *limits)
    for record in sorted(file.keys, key=lambda one: (one.tenant, one.created)):
        made.add_row(*_row(record, file.tenants.get(record.tenant, TenantLimits())))
    return made


def _row(record: KeyRecord, limits: TenantLimits) -> list[str]:
    share = "" if limits.cache_share is None else f"{limits.cache_share:.0%}"
    numbers = (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency)
    said = ["" if number is None else str(number) for number in numbers]
    first = "" if limits.first_token_s is None else f"{limits.first_token_s:g} s"
    admin = "yes" if record.admin else ""
    return [record.id, record.tenant, admin, record.created, record.revoked, *said, share, limits.priority, first]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
