"""The `metadata_server.records` of a cluster file: where it keeps what must survive it. Values only."""

from typing import Annotated

import msgspec

from kvcore.config.fields import Seconds, Section, Text


class SqliteRecordsConfig(Section, frozen=True, kw_only=True, tag_field="kind", tag="sqlite"):
    """In a file of the metadata server's own, on a local disk. Each write is flushed before it is answered."""

    path: Text | None = None
    """The file; `FILE.mark` and, while a server runs, `FILE-wal` are beside it. Not set: `records-PORT.sqlite` in the
    cluster's folder below `$XDG_STATE_HOME/kvferry` (`~/.local/state/kvferry`); with port 0, nothing is kept."""


class MemoryRecordsConfig(Section, frozen=True, kw_only=True, tag_field="kind", tag="memory"):
    """In memory: nothing survives the metadata server; drains and pins are forgotten when it starts anew."""


class EtcdRecordsConfig(Section, frozen=True, kw_only=True, tag_field="kind", tag="etcd"):
    """In etcd, version 3.4 or later, which several metadata servers can share. Needs `kvferry[etcd]`."""

    endpoints: Annotated[list[Text], msgspec.Meta(min_length=1)]
    """`http://HOST:PORT` or `https://HOST:PORT` of each member; all of one scheme."""
    prefix: Text = "kvferry/"
    """Keys begin with it and `CLUSTER/`."""
    ca: Text | None = None
    """File of the certificate (PEM) that signed the members'. Must be given with https."""
    cert: Text | None = None
    """File of our own certificate, where etcd asks for one, and …"""
    key: Text | None = None
    """… of its key."""
    user: Text | None = None
    """Who we are, where etcd has users. The password is in the environment, `KVFERRY_ETCD_PASSWORD`, or …"""
    password_file: Text | None = None
    """… the first line of this file."""
    timeout_s: Seconds = 2.0
    """For one call, whichever members it takes."""


RecordsConfig = SqliteRecordsConfig | MemoryRecordsConfig | EtcdRecordsConfig
