"""The `kv` of a cluster file: how KV is cut, checked and kept secret. Values only."""

from typing import Literal

from kvcore.config.fields import Count, Section


class KVConfig(Section, frozen=True, kw_only=True):
    """How KV is cut and checked."""

    chunk_tokens: Count = 256
    """Tokens of one chunk: what is stored, found and moved at once. All nodes of a cluster have the same."""
    verify: bool | Literal["checksum", "mac"] = True
    """What is checked of a chunk that is read, beside its header. `checksum`: whether it is damaged. `mac`: whether it
    was written with the cluster's secret. `true`: `mac` if there is one, else `checksum`. `false`: nothing."""
    encrypt: bool = False
    """Whether KV is encrypted wherever engines share it: in segments, on its way between nodes by any transport, and in
    tiers. It needs the cluster's secret. All nodes of a cluster have the same; what was stored before is not found."""
