"""The checks of what is done to chunks: how they are proved, and the tiers' codecs: what those need, when they pay."""

from collections.abc import Callable
from importlib.util import find_spec

from kvcore.config.kv_identity import LOSSY_CODECS, all_tiers
from kvferry.doctor.findings import Context, Finding
from kvstore.integrity.measure import ProofRates, measure_proofs
from kvstore.settings import chosen_verify

_SLOW_MAC_RATE = 10e9
"""Bytes a second. A processor with VAES does 20e9 to 30e9."""
_PAYS = "it pays where the tier is slower than about 0.5 GB/s, or short of room"


def check_proofs(context: Context, measure: Callable[[], ProofRates] = measure_proofs) -> list[Finding]:
    """What MACs of chunks cost on this machine. Takes some milliseconds."""
    if chosen_verify(context.config) != "mac":
        return []
    rates = measure()
    slow = "; slow (with VAES 20 and more)"
    if not context.config.kv.encrypt:  # which needs it
        slow += ": `kv.verify: checksum` costs less, and keeps out nobody"
    detail = f"mac: {rates.mac / 1e9:.1f} GB/s a thread here, where a checksum goes at {rates.checksum / 1e9:.1f}"
    found = [Finding("kv.verify", True, detail + (slow if rates.mac < _SLOW_MAC_RATE else ""))]
    if context.config.kv.encrypt:
        found.append(Finding("kv.encrypt", True, f"{rates.encrypt / 1e9:.1f} GB/s a thread here, on each end"))
    return found


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
