"""Opens the records that a cluster file asks for. A new kind is a row here."""

from pathlib import Path

from kvcore.clock import Clock
from kvcore.config.records import EtcdRecordsConfig, MemoryRecordsConfig, SqliteRecordsConfig
from kvcore.config.schema import ClusterConfig
from kvcore.partitions import Part
from kvcore.state_folder import state_folder
from metadata_server.records.base import Records
from metadata_server.records.etcd.access import EtcdAccess, etcd_access
from metadata_server.records.memory import memory_records
from metadata_server.records.sqlite import sqlite_records


async def open_records(config: ClusterConfig, clock: Clock, part: Part | None = None) -> Records:
    """Those of one partition, or (None) of the whole cluster. Await its `run`, and close it. Raises ConfigError,
    RecordsDamagedError with the file and what to do."""
    match config.metadata_server.records:
        case MemoryRecordsConfig():
            return memory_records(clock)
        case SqliteRecordsConfig():
            file = records_file(config)
            return memory_records(clock) if file is None else await sqlite_records(file, clock)
        case EtcdRecordsConfig() as section:
            from metadata_server.records.etcd.records import open_etcd

            return await open_etcd(access_of(config, section, part), clock)


def access_of(config: ClusterConfig, section: EtcdRecordsConfig, part: Part | None) -> EtcdAccess:
    """How the records in etcd of one partition, or (None) of the whole cluster, are reached. Raises ConfigError."""
    return etcd_access(section, config.cluster if part is None else f"{config.cluster}/parts/{part.name}")


def records_file(config: ClusterConfig) -> Path | None:
    """Of kind `sqlite`. None: nobody would find the file of a server on any free port again. Raises ConfigError."""
    records, port = config.metadata_server.records, config.metadata_server.port
    assert isinstance(records, SqliteRecordsConfig), "the other kinds have no file"
    if records.path is not None:
        return Path(records.path).expanduser()
    return state_folder(config.cluster) / f"records-{port}.sqlite" if port else None
