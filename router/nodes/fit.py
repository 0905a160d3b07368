"""Whether a node is of the router's own cluster, model and tokenizer, by what the node says of itself. Pure.

What either side does not say is not held against the node: older ones say less, and some engines have no tokenizer.
"""

from dataclasses import dataclass

import msgspec

from kvcore.identity import ClusterIdentity
from kvcore.types import NodeInfo, Role
from nodeapi.messages import NodeReport


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
