"""The check of what must survive the metadata server: where it lies, and whether it can be written."""

from kvcore.config.servers import addresses_of, as_server_at
from kvferry.doctor.findings import Context, Finding
from kvferry.machine import is_local
from metadata_server.records.look import look_at_records

_RECORDS = "records"


def check_records(context: Context) -> list[Finding]:
    """Look where a metadata server of this machine will keep its records."""
    config = context.config
    seen = [as_server_at(config, addresses_of(one)[0]) for one in config.metadata_server.partitions] or [config]
    looks = [look_at_records(one) for one in seen if context.all_here or is_local(one.metadata_server.host)]
    return [
        Finding(_RECORDS, True, look.shown)
        if look.wrong is None
        else Finding(_RECORDS, False, f"{look.shown}: {look.wrong}", "correct metadata_server.records")
        for look in dict.fromkeys(looks)
    ]
