"""The set of the index's partitions as a record: a metadata server of another set does not begin.

Owns that record alone. What keeps room from being given out twice is that nodes and servers say the set to each other
(`metadata_server.versions`); this tells who started a server with another file, before anybody meets it.
"""

import logging

import msgspec

from kvcore.errors import ConfigError, RecordsUnavailableError
from kvcore.partitions import Partitions
from kvcore.telemetry import log_fields
from metadata_server.records.base import ABSENT, PutOutcome, Records

SET = "partitions"
_logger = logging.getLogger("metadata_server")


async def join_set(records: Records, ours: Partitions | None, *, change: bool = False) -> None:
    """Who finds no record of the set writes it; None: the index is one server's, and writes none. `change`: ours is the
    set from now on. Raises ConfigError where the record says another set. Records that are away are asked by the next
    start."""
    names = () if ours is None else ours.names
    try:
        while True:
            found = await records.get(SET)
            known = None if found is None else msgspec.json.decode(found.value, type=tuple[str, ...])
            if known == names or (known is None and not names):
                return
            if known is not None and not change:
                raise ConfigError(
                    f"metadata_server.partitions: the records say that the index has {_shown(known)}, and this file "
                    f"says {_shown(names)}: start all with one file, or this server with --change-partitions"
                )
            expect = ABSENT if found is None else found.revision
            reply = await records.put(SET, msgspec.json.encode(names), expect=expect)
            if reply.outcome is PutOutcome.WRITTEN:
                log_fields(_logger, logging.WARNING, "partitions", now=_shown(names), before=_shown(known or ()))
                return
    except RecordsUnavailableError as error:
        log_fields(_logger, logging.WARNING, "partitions_not_checked", reason=error.message)


def _shown(names: tuple[str, ...]) -> str:
    return f"partitions {', '.join(names)}" if names else "one server"
