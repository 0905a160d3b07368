"""How long a node's legs may be silent, from how long they were: first tokens by what they compute, then gaps. Pure.

A limit is a few times what is slow for this node, and never under the floor of the cluster file.
"""

import math
from collections import deque

from router.nodes.limits import NodeHealthLimits


class SlowOnes:
    """The last few (`kept`) observations of one thing. They are put in order when somebody asks what is slow: that is
    seldom, and they are many."""

    def __init__(self, kept: int, share: float) -> None:
        self._share = share
        self._last = deque[float](maxlen=kept)

    def __repr__(self) -> str:
        return f"<SlowOnes of {len(self._last)}, slow is {self.slow} s>"

    def add(self, seconds: float) -> None:
        """One more, in place of the oldest."""
        self._last.append(seconds)

    @property
    def slow(self) -> float | None:
        """So many of them (`share`) took no longer, the slowest one never counts; None: there are none."""
        if not self._last:
            return None
        ordered = sorted(self._last)
        return ordered[max(0, min(math.ceil(self._share * len(ordered)) - 1, len(ordered) - 2))]


class NodePace:
    """Of one node. Seconds; `computed`: prompt tokens that a leg computes before its first token."""

    def __init__(self, limits: NodeHealthLimits) -> None:
        self._limits = limits
        self.quiet_s = 0.0
        """How long nothing was seen of its work, while legs of ours were there to be worked on. Set with each token."""
        self._first = SlowOnes(limits.paces_kept, limits.pace_share)
        self._per_token = SlowOnes(limits.paces_kept, limits.pace_share)
        self._gap = SlowOnes(limits.paces_kept, limits.pace_share)
        self._slack = 1.0
        self._since_slack = 0

    def __repr__(self) -> str:
        return f"<NodePace first {self._first.slow} s, token {self._per_token.slow} s, gap {self._gap.slow} s>"

    def first_limit_s(self, floor_s: float, computed: int) -> float:
        """How long the first token, or the answer of a prefill leg, may take."""
        limits, slow = self._limits, self._per_token.slow
        per_token = limits.pace_factor * slow if slow is not None else limits.unknown_token_s
        return self._limit(floor_s, self._first) + self._slack * per_token * computed

    def gap_limit_s(self, floor_s: float) -> float:
        """How long a stream may say nothing between two tokens."""
        return self._limit(floor_s, self._gap)

    def began(self, seconds: float, computed: int) -> None:
        """A leg's first token came, or its prefill was answered."""
        if computed >= self._limits.pace_tokens:
            self._per_token.add(seconds / computed)
        else:
            self._first.add(seconds)

    def ended(self, longest_gap_s: float) -> None:
        """A leg that had begun is over; so long it said nothing in between."""
        self._gap.add(longest_gap_s)
        self.kept()

    def kept(self) -> None:
        """A leg is over that kept to its limits."""
        self._since_slack += 1
        if self._since_slack >= self._limits.slack_legs:
            self._since_slack, self._slack = 0, max(1.0, self._slack / 2)

    def was_only_slow(self) -> None:
        """It was taken for stalled, and works: it has more time from here on, until it has kept pace for a while."""
        self._since_slack, self._slack = 0, min(self._limits.most_slack, 2 * self._slack)

    def _limit(self, floor_s: float, seen: SlowOnes) -> float:
        return self._slack * max(floor_s, self._limits.pace_factor * (seen.slow or 0.0))
