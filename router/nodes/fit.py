"""Whether a node is of the router's own cluster, model and tokenizer, by what the node says of itself. Pure.

What either side does not say is not held against the node: older ones say less, and some engines have no tokenizer.
"""

from dataclasses import dataclass

import msgspec

from kvcore.identity import ClusterIdentity
from kvcore.types import NodeInfo, Role
from nodeapi.messages import NodeReport
from router.nodes.limits import NodeHealthLimits


@dataclass(frozen=True, slots=True)
class RouterIdentity:
    """What the router's own file and model folder say. `tokenizer_digest`: hex, of its `tokenizer.json`; empty: it
    tokenizes without one."""

    names: ClusterIdentity
    tokenizer_digest: str = ""

    def why_unfit(self, report: NodeReport) -> str | None:
        """Why no request may go to this node, as long as it says this of itself; None: it fits."""
        return self.names.why_foreign(_named(report)) or self._why_other_tokenizer(report)

    def _why_other_tokenizer(self, report: NodeReport) -> str | None:
        theirs = report.engine.kv_spec.tokenizer_digest if report.engine else report.node.tokenizer_digest
        ours = self.tokenizer_digest
        if not theirs or not ours or theirs == ours:
            return None
        return (
            f"its tokenizer is not the router's (sha256 {theirs[:12]} and {ours[:12]}), so it would read other text "
            "than was written: give both the same model folder"
        )


def _named(report: NodeReport) -> NodeInfo:
    """The node, with its model's name from the KVSpec where it comes from a version that said it only there."""
    node, engine = report.node, report.engine
    return node if node.model or engine is None else msgspec.structs.replace(node, model=engine.kv_spec.model_id)


def why_other(report: NodeReport, name: str, role: Role, url: str) -> str | None:
    """Why it is not the node that is expected at this URL; None: it is."""
    if report.node.id != name or report.node.role is not role:
        return f"{url} is {report.node.role} {report.node.id}, not {role} {name}"
    return None


def why_not_now(report: NodeReport) -> str | None:
    """Why a node that fits cannot be used at the moment; None: it can."""
    if report.draining:
        return "draining"
    if report.engine is None and report.node.role is not Role.STORE:
        return "its engine is not running"
    return None


def why_unsound(report: NodeReport, limits: NodeHealthLimits) -> str | None:
    """Why nothing may be counted with what this node says of itself; None: it may. A node that lies here would else
    have every request refused, or none."""
    engine, stats = report.engine, report.stats
    numbers: list[tuple[str, int, int, int]] = [("segments", len(report.segments), 0, limits.max_segments)]
    if engine is not None:
        numbers += [
            ("max_context", engine.max_context, 1, limits.max_context),
            ("vocab_size", engine.vocab_size, 1, limits.max_vocab),
            ("chunk_tokens", engine.kv_spec.chunk_tokens, 1, limits.max_context),
            ("eos_token_ids", len(engine.eos_token_ids), 0, limits.max_end_tokens),
        ]
    if stats is not None:
        counts = (("running", stats.running), ("waiting", stats.waiting))
        numbers += [(name, count, 0, limits.max_context) for name, count in counts]
    for name, value, least, most in numbers:
        if not least <= value <= most:
            return f"its report makes no sense: {name} is {value}, not within {least} to {most}"
    return None


def has_worked(before: NodeReport, now: NodeReport) -> bool:
    """Whether its engine has counted any work in between. Legs that it was told to end are none."""
    if before.stats is None or now.stats is None:
        return False
    counted = before.stats.counters
    return any(count != counted.get(name, 0) for name, count in now.stats.counters.items() if name != "aborted")
