"""When a request's first token can be expected, and whether a node has room for it: from what is measured. Pure."""

import math
from collections.abc import Sequence

import msgspec

from router.admission.limits import AdmissionLimits
from router.routing.decision import Decision
from router.routing.views import NodeView


class Forecast(msgspec.Struct, frozen=True):
    """`own_s`: from a node's beginning with it to its first token. `tokens` of its prompt are to be computed, by one of
    `computes`, and it will be decoded by one of `decodes`, as they were at `now`."""

    has_room: bool
    own_s: float
    tokens: int
    now: float
    computes: Sequence[NodeView]
    decodes: Sequence[NodeView]
    stays: bool
    """Its decoder computes it."""
    idle_in_s: float = 0.0
    """In so many seconds one of `computes` has nearly nothing to compute, whether or not there is a place."""
    look_in_s: float | None = None
    """Without anything that ends until then, in so many seconds there may be room; None: not even then."""

    def wait_s(self, tokens: int, sequences: int) -> float:
        """How long until a node begins with it, behind so much that waits in the router."""
        ends = sum(node.max_sequences / node.stay_s for node in self.decodes if node.stay_s)
        more = max(0.0, sequences + _excess(self.decodes))
        return max(self._computed_s(tokens), more / ends if ends else 0.0)

    def _computed_s(self, tokens: float) -> float:
        """When the nodes, each from the moment that it is free, have so many tokens behind them, and one is free."""
        at_s = rate = 0.0
        for free_s, more in sorted(_free(node, self.now) for node in self.computes if node.prefill_rate):
            if rate and at_s + tokens / rate <= free_s:
                break
            tokens -= rate * (free_s - at_s)
            at_s, rate = free_s, rate + more
        return at_s + tokens / rate if rate else 0.0


def forecast(decision: Decision, prompt_tokens: int, now: float, limits: AdmissionLimits) -> Forecast:
    """Of a decision with a route, for a request whose prompts have so many tokens together. Only the chosen nodes are
    looked at if they have room."""
    route = decision.route
    assert route is not None
    tokens = max(1, prompt_tokens - route.expected_cached_tokens)
    decodes, decoding = decision.decoders, decision.decoders.node
    if decoding is None:
        assert decision.prefillers is not None
        decodes, decoding = decision.prefillers, decision.prefillers.node
    computes, computing = decodes, decoding
    if route.prefiller is not None and decision.prefillers is not None:
        computes, computing = decision.prefillers, decision.prefillers.node
    assert decoding is not None and computing is not None
    own_s = (tokens / computing.prefill_rate if computing.prefill_rate else 0.0) + decoding.step_s
    preparing = min(limits.preparing, own_s / decoding.stay_s) if decoding.stay_s else 0.0
    free = _is_free(decoding, preparing) or any(_is_free(node, preparing) for node in decodes.usable)
    idle_in_s = _nearly_done_s(computing, now, limits)
    if idle_in_s:  # or another one has nearly nothing to do: then the policy, which knows that, has its reasons
        idle_in_s = min([_nearly_done_s(node, now, limits) for node in computes.usable])
    look_in_s = idle_in_s if free and 0 < idle_in_s < math.inf else None
    room, stays = free and idle_in_s <= 0, computes is decodes
    return Forecast(room, own_s, tokens, now, computes.usable, decodes.usable, stays, idle_in_s, look_in_s)


def _free(node: NodeView, now: float) -> tuple[float, float]:
    """(when it will have nothing else to compute, its tokens a second). What it has to compute counts as half done at
    most, however long it has been at it: it may hang."""
    all_s = node.prefill_tokens / node.prefill_rate
    told_s = 0.0 if node.told is None else node.told.left_tokens(node.prefill_rate, now) / node.prefill_rate
    return max(told_s, all_s / 2, all_s - (now - node.computing_since)), node.prefill_rate


def _nearly_done_s(node: NodeView, now: float, limits: AdmissionLimits) -> float:
    """In how many seconds it has nearly nothing to compute; inf: nobody knows. 0 also for one of which nothing is
    known, or no more than a warm-up, by which all others would be late: it must be tried. The next prompt is sent
    before the only one that it has is said to be done, so that the node has it in time; with two nobody knows how far
    it is, and one that hangs gets no third."""
    if not node.prefill_rate or node.is_warm_up:
        return 0.0
    told_s = 0.0 if node.told is None else node.told.left_tokens(node.prefill_rate, now) / node.prefill_rate
    others_s = max(0.0, told_s - limits.ahead_s)
    left_s = node.prefill_tokens / node.prefill_rate - limits.ahead_s
    if left_s <= 0:
        return others_s
    return max(others_s, left_s - (now - node.computing_since)) if node.prefills == 1 else math.inf


def _is_free(node: NodeView, preparing: float) -> bool:
    """Whether one more sequence will find a place when its KV is there. `preparing`: the share of sequences that are
    not there yet while all places are taken."""
    return not node.max_sequences or node.sequences + 1 <= node.max_sequences * (1 + preparing)


def _excess(nodes: Sequence[NodeView]) -> float:
    """Sequences that must end before there is a place; below 0: places that are free."""
    if not all(node.max_sequences for node in nodes):
        return float("-inf")
    return sum(node.sequences - node.max_sequences for node in nodes) + 1
