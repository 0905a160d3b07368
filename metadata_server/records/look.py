"""Where the records of a cluster file lie, and whether they can be written: for who asks before anything is started."""

import os

import msgspec

from kvcore.config.records import MemoryRecordsConfig, SqliteRecordsConfig
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from metadata_server.records.opening import records_file


class RecordsLook(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen. `wrong` is None where a metadata server could begin."""

    shown: str
    wrong: str | None = None


def look_at_records(config: ClusterConfig) -> RecordsLook:
    """Look, on the machine that is to run the metadata server. Opens and changes nothing."""
    match config.metadata_server.records:
        case MemoryRecordsConfig():
            return RecordsLook(shown="in memory: pins end with the metadata server")
        case SqliteRecordsConfig():
            return _look_at_file(config)


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
