"""The check of the cluster's secret: it can be had, and is one."""

from kvcore.config.checks import open_line
from kvcore.errors import ConfigError
from kvcore.trust.opening import open_trust, trust_source
from kvferry.doctor.findings import Context, Finding

_SUBJECT = "security"


def check_security(context: Context) -> list[Finding]:
    """Reads the secret, or runs its command."""
    try:
        trust = open_trust(trust_source(context.config))
    except ConfigError as error:
        return [Finding(_SUBJECT, False, error.message, "see `security.secret` in docs/config.md")]
    if trust.secrets is None:
        line = open_line(context.config)
        return [] if line is None else [Finding(_SUBJECT, True, line)]
    keys = trust.secrets.accepted
    before = f", {keys[1].id.hex()} is accepted too" if len(keys) > 1 else ""
    return [Finding(_SUBJECT, True, f"the cluster has a secret: {keys[0].id.hex()} signs{before}")]
