"""Ends answers that repeat themselves: the last tokens are some pattern, again and again.

As vLLM has it (`check_sequence_repetition`), so that the same token is the last one. Pure.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Repetition(NamedTuple):
    """Patterns of `min_size` to `max_size` tokens, `min_count` times in a row: at least 1 and 2."""

    min_size: int
    max_size: int
    min_count: int


class RepetitionWatch:
    """Of one answer. `min_tokens`: before so many nothing is looked for."""

    def __init__(self, rule: Repetition, min_tokens: int) -> None:
        self._rule, self._min_tokens = rule, min_tokens
        self._tokens: list[int] = []

    def feed(self, token_id: int) -> bool:
        """One more token. Whether the answer repeats itself now."""
        tokens, rule = self._tokens, self._rule
        tokens.append(token_id)
        if len(tokens) < self._min_tokens:
            return False
        longest = min(rule.max_size, len(tokens) // rule.min_count)
        return any(_repeats(tokens, size, rule.min_count) for size in range(rule.min_size, longest + 1))


def _repeats(tokens: Sequence[int], size: int, count: int) -> bool:
    """Whether the last `size` tokens come `count` times, one right after the other: each token but the first of them is
    what it was `size` tokens before."""
    if tokens[-1] != tokens[-1 - size]:
        return False
    end = len(tokens)
    return tokens[end - size * (count - 1) :] == tokens[end - size * count : end - size]
