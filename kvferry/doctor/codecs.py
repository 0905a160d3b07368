"""The check of the tiers' codecs: what they need is installed, and when they pay."""

from importlib.util import find_spec

from kvcore.config.kv_identity import LOSSY_CODECS, all_tiers
from kvferry.doctor.findings import Context, Finding

_PAYS = "it pays where the tier is slower than about 0.5 GB/s, or short of room"


def check_codecs(context: Context) -> list[Finding]:
    """Of each tier with one."""
    return [_finding(section, tier.codec) for section, tier in all_tiers(context.config) if tier.codec != "none"]


def _finding(section: str, codec: str) -> Finding:
    subject = f"{section}.codec"
    if codec == "lossless" and find_spec("blosc2") is None:
        return Finding(subject, False, "lossless needs blosc2", "pip install 'kvferry[codec]'")
    if codec in LOSSY_CODECS:
        return Finding(subject, True, f"{codec} is lossy: this cluster's KV is a kind of its own; {_PAYS}")
    return Finding(subject, True, f"{codec}: {_PAYS}")
