"""Where the records of a cluster file lie, and whether they can be written: for who asks before anything is started."""

import asyncio
import os
import secrets
from dataclasses import replace

import msgspec

from kvcore.clock import SystemClock
from kvcore.config.records import EtcdRecordsConfig, MemoryRecordsConfig, SqliteRecordsConfig
from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import own_part
from kvcore.errors import ConfigError, KVFerryError
from metadata_server.records.etcd.access import EtcdAccess
from metadata_server.records.opening import access_of, records_file


class RecordsLook(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen. `wrong` is None where a metadata server could begin."""

    shown: str
    wrong: str | None = None


def look_at_records(config: ClusterConfig) -> RecordsLook:
    """Look, on the machine that is to run the metadata server. Changes no file; at each member of etcd a record is
    written and removed. Blocking, for two calls of its time there."""
    match config.metadata_server.records:
        case MemoryRecordsConfig():
            return RecordsLook(shown="in memory: pins end with the metadata server")
        case SqliteRecordsConfig():
            return _look_at_file(config)
        case EtcdRecordsConfig() as section:
            try:
                access = access_of(config, section, own_part(config.metadata_server))
            except ConfigError as error:
                return RecordsLook(shown="etcd", wrong=error.message)
            return asyncio.run(_look_at_etcd(access))


def _look_at_file(config: ClusterConfig) -> RecordsLook:
    try:
        file = records_file(config)
    except ConfigError as error:
        return RecordsLook(shown="nowhere", wrong=error.message)
    if file is None:
        return RecordsLook(shown="in memory: metadata_server.port is 0, and pins end with the metadata server")
    parts = [part for part in (file, file.with_name(file.name + ".mark")) if part.exists()]
    folder = next(parent for parent in file.parents if parent.exists())
    refused = [str(part) for part in (*parts, folder) if not os.access(part, os.W_OK)]
    if not folder.is_dir():
        refused = [str(folder)]
    if refused:
        return RecordsLook(shown=str(file), wrong=f"{' and '.join(refused)} cannot be written")
    return RecordsLook(shown=f"{file}{'' if parts else ', which will be made'}")


async def _look_at_etcd(access: EtcdAccess) -> RecordsLook:
    problems = [problem for problem in await asyncio.gather(*(_try(access, host) for host in access.hosts)) if problem]
    shown = f"etcd at {', '.join(access.hosts)}, below {access.prefix}"
    return RecordsLook(shown=shown, wrong="; ".join(problems) or None)


async def _try(access: EtcdAccess, host: str) -> str:
    """What is wrong with one member; empty: nothing."""
    from metadata_server.records.etcd.records import EtcdRecords

    records, key = EtcdRecords(replace(access, hosts=(host,)), SystemClock()), f"doctor/{secrets.token_hex(8)}"
    try:
        await records.put(key, b"")
        await records.delete(key)
    except KVFerryError as error:
        return error.message
    finally:
        await records.aclose()
    return ""
