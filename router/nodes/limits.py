"""The limits and pauses around nodes, in one struct that tests may change. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeHealthLimits:
    """What an operator sets (interval and timeout of probes) is in RouterConfig."""

    lost_rounds: int = 4
    """Rounds of probes without an answer (12 s by default) after which legs on a node are given up. A process that dies
    breaks its connections and is noticed by them; a host that hangs or is cut off breaks none."""
    lost_rounds_lapsed: int = 1
    """As many do (3 s by default: two probes, as one is not waited for so long) once the metadata server, which hears
    nothing of the node either, has said that its lease has ended."""
    unknown_s: float = 5.0
    """How long the metadata server may not know a node that is used until that counts as a problem: a node that starts,
    or one whose server started anew, registers within a third of its lease."""
    failures_to_open: int = 3
    """Legs in a row that fail by their node's fault until its breaker opens."""
    first_pause_s: float = 0.5
    """How long a breaker stays open at first; each failed try doubles it ..."""
    longest_pause_s: float = 15.0
    """... up to this."""
    vllm_keepalive_s: float = 3.0
    """vLLM closes idle connections after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); a request must not meet that."""
    vllm_usage_s: float = 0.5
    """How long a stream's last token may be held back for the usage behind it."""
    strangers_at_once: int = 64
    """Nodes that are asked at the same time of which nothing but an event is known. Each may be an address that
    swallows what it is sent; others wait for the next round."""
    max_problem_chars: int = 500
    """Of what a node says is wrong, as the log and /v1/cluster show it."""
    max_context: int = 1 << 27
    """What a node may say of itself at most; so with the following."""
    max_vocab: int = 1 << 32
    max_end_tokens: int = 4096
    max_segments: int = 256
