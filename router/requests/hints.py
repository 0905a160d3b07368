"""What a client asks of the cache for its prompt, and what became of it. Values only: no answer depends on any."""

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class CacheHint:
    """`name`: the client's field. `asked`: its value, as it is shown. `keep_s`: how long the prompt's KV shall be kept;
    None: it asks for nothing that is done, and `note` says why."""

    name: str
    asked: str
    keep_s: float | None = None
    note: str = ""


class HintRecord(msgspec.Struct, kw_only=True):
    """One hint of a request. `applied`: whether something was done; `why`: what, or why nothing."""

    name: str
    asked: str
    applied: bool = False
    why: str = ""
