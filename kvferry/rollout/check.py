"""Whether a rollout of this cluster that was begun from this machine is over."""

from collections.abc import Sequence

from kvcore.errors import ConfigError
from kvferry.doctor.findings import Context, Finding
from kvferry.rollout.record import unfinished


def check_rollout(context: Context) -> Sequence[Finding]:
    """Nothing is said where none was cut off or stopped."""
    try:
        left = unfinished(context.config.cluster)
    except ConfigError as error:
        return [
            Finding("rollout", False, error.message, "then begin the rollout again: it finds out what is left to do")
        ]
    remedy = "`kvferry rollout FILE` goes on, `kvferry rollout --back` returns to what was"
    return [Finding("rollout", False, left, remedy)] if left else []
