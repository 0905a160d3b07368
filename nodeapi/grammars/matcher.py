"""One answer inside its grammar: which tokens may come next.

Owns the place in the grammar, and where free text before it ends. What was drawn is looked up in the answer's tokens,
never told: so an answer that goes on elsewhere, or that was computed anew, is in the same place.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from nodeapi.grammars.grammar import Grammar, stands_before

Mask = npt.NDArray[np.bool_]


class GrammarMatcher:
    """Of one completion. `prototype`: compiled, at the grammar's beginning; a copy of it costs microseconds."""

    def __init__(self, grammar: Grammar, prototype: LLMatcher, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self._grammar = grammar
        self._prototype = prototype
        self._eos = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._matcher: LLMatcher = prototype.deep_copy()
        self._seen = 0
        """Tokens of the output that the place is behind."""
        self._is_free = bool(grammar.after) and not grammar.opening
        self._may_open = bool(grammar.after and grammar.opening)
        """The output is a beginning of the opening, as far as it goes."""
        self._must_open = False
        """And it is none of the grammar."""
        self.ended = False
        """At the last mask nothing could come but the end."""
        self.problem = ""
        """Why no token can come at all; empty: one can."""

    def __repr__(self) -> str:
        where = "free" if self._is_free else "at its end" if self.ended else "inside"
        kind = self._grammar.kind.value
        return f"<GrammarMatcher {kind} {self.problem or where}, {self._seen} tokens>"

    def fork(self) -> "GrammarMatcher":
        """One for a sister that begins with the same tokens and goes on by itself."""
        copy = GrammarMatcher(self._grammar, self._prototype, self._eos, self._vocab_size)
        copy.ended, copy.problem = self.ended, self.problem
        return copy

    def mask(self, output: Sequence[int], ends: Sequence[int], *, may_end: bool = True) -> Mask | None:
        """[vocabulary], True for each token that may come behind `output`; None: all may, or none (then `problem` says
        why). `ends`: tokens that end a completion, beside the grammar's own end; `may_end` False: it should not end
        yet, and does only where the grammar leaves nothing else. Blocking: microseconds, in bad cases milliseconds."""
        self._follow(output)
        if self._is_free or self.problem:
            return None
        mask = np.zeros(self._vocab_size, dtype=np.bool_) if self._must_open else self._bits()
        if mask is None:
            return None
        accepting = not self._must_open and self._matcher.is_accepting()
        finals = [token for token in {*ends, *self._eos} if token < self._vocab_size]
        mask[finals] = False
        if self._may_open:
            mask[self._grammar.opening[len(output)]] = True
        self.ended = accepting and not mask.any()
        if accepting and (may_end or self.ended):
            mask[[token for token in ends if token < self._vocab_size] if not self.ended else finals] = True
        if not mask.any():
            self.problem = "the grammar leaves no token that could come next"
            return None
        return mask

    def _follow(self, output: Sequence[int]) -> None:
        """Move the place behind `output`."""
        grammar = self._grammar
        while self._seen < len(output) and not self.problem:
            token = output[self._seen]
            self._seen += 1
            if self._is_free:
                # The end of the reasoning may have come: what follows is the grammar's.
                self._is_free = not stands_before(output, self._seen, grammar.after)
                continue
            if self._may_open and token == grammar.opening[self._seen - 1]:
                self._is_free = self._seen == len(grammar.opening)
                self._may_open = not self._is_free
                if self._is_free:
                    self._matcher, self._must_open = self._prototype.deep_copy(), False
                elif not self._must_open:
                    self._must_open = self._matcher.try_consume_tokens([token]) == 0
                continue
            self._may_open = False
            if self._must_open or not self._matcher.consume_token(token):
                self.problem = f"token {token} does not follow the grammar: {_first_line(self._matcher)}"

    def _bits(self) -> Mask | None:
        """What the grammar says of each token."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self.problem = f"the grammar cannot be followed on: {_first_line(self._matcher)}"
            return None
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)


def _first_line(matcher: LLMatcher) -> str:
    return str(matcher.get_error()).partition("\n")[0] or "it is at its end"
