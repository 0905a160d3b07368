"""What a router's processes tell each other of themselves. Values; readers ignore fields that they do not know."""

from dataclasses import dataclass

import msgspec

from router.cache.report import CacheStats
from router.requests.records import RequestRecord
from router.status import RequestTotals

OWN = "/v1/process"
"""What the process that is asked says of itself alone."""


@dataclass(frozen=True, slots=True)
class ProcessPlace:
    """Which process of its router this one is, from 1 on, and what it is called; empty: it is the only one."""

    name: str = ""
    number: int = 1


class ProcessReport(msgspec.Struct, kw_only=True):
    """The body of GET /v1/process. Tokens are of answered prompts."""

    name: str = ""
    stopping: bool = False
    requests: RequestTotals
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache: CacheStats = msgspec.field(default_factory=CacheStats)


class OwnRecords(msgspec.Struct):
    """The body of GET /v1/process/requests, the newest first; also of those with an id."""

    requests: list[RequestRecord]
