"""The check of what must survive the metadata server: where it lies, and whether it can be written."""

from kvferry.doctor.findings import Context, Finding
from kvferry.machine import is_local
from metadata_server.records.look import look_at_records

_RECORDS = "records"


def check_records(context: Context) -> list[Finding]:
    """Look where a metadata server of this machine will keep its records."""
    if not context.all_here and not is_local(context.config.metadata_server.host):
        return []
    look = look_at_records(context.config)
    if look.wrong is None:
        return [Finding(_RECORDS, True, look.shown)]
    return [Finding(_RECORDS, False, f"{look.shown}: {look.wrong}", "correct metadata_server.records")]
