"""The limits and pauses around nodes, in one struct that tests may change. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeHealthLimits:
    """What an operator sets (interval and timeout of probes) is in RouterConfig."""

    lost_rounds: int = 3
    """Rounds of probes without an answer (9 s by default) after which legs on a node are given up. A process that dies
    breaks its connections and is noticed by them; a host that hangs or is cut off breaks none."""
    lost_rounds_lapsed: int = 1
    """As many do (3 s by default: two probes, as one is not waited for so long) once the metadata server, which hears
    nothing of the node either, has said that its lease has ended."""
    unknown_s: float = 5.0
    """How long the metadata server may not know a node that is used until that counts as a problem: a node that starts,
    or one whose server started anew, registers within a third of its lease."""
    misses_to_lose: int = 3
    """Probes in a row that came too late until a node is not used any more. From the first one on others are preferred;
    one that refuses its connection is lost at once."""
    look_s: float = 0.25
    """Between two looks at how long legs have been silent."""
    again_s: float = 1.0
    """A stalled leg that cannot go elsewhere is looked at again after so long."""
    paces_kept: int = 64
    """Legs whose pace is remembered; …"""
    pace_share: float = 0.95
    """… what so many of them kept to, …"""
    pace_factor: float = 3.0
    """… times this, is how long the next one may take."""
    pace_tokens: int = 256
    """From so many tokens to compute on, a first token's time is counted for each token."""
    unknown_token_s: float = 0.005
    """For each token to compute, of a node that has not shown how fast it is: 200 tokens/s."""
    most_slack: float = 4.0
    """A node that was suspected wrongly has up to so many times as long, …"""
    slack_legs: int = 16
    """… half of that after so many legs."""
    trusted_legs: int = 32
    """A node that works again is trusted as any once it may have so many legs at a time; it begins with one."""
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
    probes_at_once: int = 32
    """Nodes that are asked in one step, about 2 ms of the event loop; with more the others follow …"""
    probes_per_s: int = 640
    """At most, of all nodes: with more than this many the interval between two probes of one grows. Each takes about
    70 us, so that probing takes less than a twentieth of a core, however many there are."""
    spread_share: float = 0.8
    """… over this share of the interval, …"""
    batch_pause_s: float = 0.005
    """… or so much later each, where they are asked out of turn."""
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
