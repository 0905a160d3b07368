"""One line of the log for each thing that an operator had done: who, what, on what, and what came of it."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvcore.errors import KVFerryError
from kvcore.telemetry import log_fields

_logger = logging.getLogger("audit")


@dataclass(slots=True)
class AuditLine:
    """What is not known when the action begins. `on`: what it is about; `outcome`: `ok`, or what it became instead."""

    on: str = ""
    outcome: str = "ok"


def caller(client: "tuple[str, int] | None") -> str:
    """Who asks, by the `client` of an ASGI request."""
    return "unknown" if client is None else f"{client[0]}:{client[1]}"


@contextmanager
def audited(who: str, what: str, on: str = "") -> Iterator[AuditLine]:
    """Log the action when it has ended, however it did: an error's code is its outcome then."""
    line = AuditLine(on)
    try:
        yield line
    except KVFerryError as error:
        line.outcome = error.code
        raise
    except asyncio.CancelledError:
        line.outcome = "cancelled"
        raise
    except BaseException:
        line.outcome = "failed"
        raise
    finally:
        log_fields(_logger, logging.INFO, "audit", who=who, what=what, on=line.on, outcome=line.outcome)
