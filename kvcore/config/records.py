"""The `metadata_server.records` of a cluster file: where it keeps what must survive it. Values only."""

from kvcore.config.fields import Section, Text


class SqliteRecordsConfig(Section, frozen=True, kw_only=True, tag_field="kind", tag="sqlite"):
    """In a file of the metadata server's own, on a local disk. Each write is flushed before it is answered."""

    path: Text | None = None
    """The file; `FILE.mark` and, while a server runs, `FILE-wal` are beside it. Not set: `records-PORT.sqlite` in the
    cluster's folder below `$XDG_STATE_HOME/kvferry` (`~/.local/state/kvferry`); with port 0, nothing is kept."""


class MemoryRecordsConfig(Section, frozen=True, kw_only=True, tag_field="kind", tag="memory"):
    """In memory: nothing survives the metadata server."""


RecordsConfig = SqliteRecordsConfig | MemoryRecordsConfig
