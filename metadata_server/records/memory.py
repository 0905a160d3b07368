"""Records in memory: for tests, the simulator, and clusters that need nothing to survive their metadata server."""

from kvcore.clock import Clock
from metadata_server.records.embedded import EmbeddedRecords
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.table import RecordsTable


def memory_records(clock: Clock, limits: RecordsLimits = RecordsLimits()) -> EmbeddedRecords:
    """None yet."""
    return EmbeddedRecords(RecordsTable((), {}, 0, limits), clock, limits=limits)
