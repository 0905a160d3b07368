"""Where a grammar of vLLM's begins that is not at the engine's own first token, against a grammar that only counts."""

import random
from collections.abc import Sequence

import pytest
import torch

from engines.vllm.placed_grammar import FreeText, PlacedGrammar

OPEN, END_A, END_B = 90, (91, 92), (93,)
LETTERS = range(4)


class Inner:
    """Follows `LETTERS` in a row, over and over, `LENGTH` of them."""

    LENGTH = 6

    def __init__(self) -> None:
        self.seen: list[int] = []

    def _may_come(self, at: int) -> int | None:
        return at % len(LETTERS) if at < self.LENGTH else None

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        for token in tokens:
            if token != self._may_come(len(self.seen)):
                return False
            self.seen.append(token)
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        good: list[int] = []
        for at, token in enumerate(tokens, start=len(self.seen)):
            if token != self._may_come(at):
                break
            good.append(token)
        return good

    def rollback(self, num_tokens: int) -> None:
        assert 0 < num_tokens <= len(self.seen)
        del self.seen[len(self.seen) - num_tokens :]

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        bitmask[batch_index].fill_(0)
        token = self._may_come(len(self.seen))
        if token is not None:
            bitmask[batch_index, 0] = 1 << token

    def is_terminated(self) -> bool:
        return len(self.seen) == self.LENGTH

    def reset(self) -> None:
        self.seen = []


def allowed(grammar: PlacedGrammar) -> set[int] | None:
    """None: every token."""
    bitmask = torch.zeros((2, 4), dtype=torch.int32)
    grammar.fill_bitmask(bitmask, 1)
    assert not bitmask[0].any()
    if (bitmask[1] == -1).all():
        return None
    return {32 * word + bit for word in range(4) for bit in range(32) if int(bitmask[1, word]) >> bit & 1}


FREE = {
    "none": FreeText(),
    "under way": FreeText((END_A, END_B)),
    "may open": FreeText((END_A, END_B), (OPEN,)),
}


def begins_in(free: FreeText, tokens: Sequence[int]) -> int | None:
    """As its documentation says it, the slow way."""
    if not free.after or (free.opening and tokens and tokens[0] != OPEN):
        return 0
    heads = [tuple(tokens[:end]) for end in range(len(tokens) + 1)]
    return min((len(head) for head in heads for marks in free.after if head[-len(marks) :] == marks), default=None)


def expected(free: FreeText, tokens: Sequence[int]) -> tuple[set[int] | None, bool]:
    """What may come behind `tokens`, and whether that is the end."""
    start = begins_in(free, tokens)
    opens = bool(free.opening) and not tokens
    if start is None and not opens:
        return None, False
    inside = len(tokens) - (start or 0)
    over = start is not None and inside == Inner.LENGTH
    may = set() if over else {inside % len(LETTERS)}
    return may | ({OPEN} if opens else set()), over


@pytest.mark.parametrize("free", FREE.values(), ids=FREE)
@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_taken_and_taken_back_what_may_come_is_right(free: FreeText, seed: int) -> None:
    chance = random.Random(seed)
    inner = Inner()
    placed, tokens = PlacedGrammar(inner, free), list[int]()
    for _ in range(60):
        if tokens and chance.random() < 0.3:
            count = chance.randint(1, len(tokens))
            placed.rollback(count)
            del tokens[-count:]
        elif chance.random() < 0.05:
            placed.reset()
            tokens.clear()
        else:
            more: list[int] = []
            for _ in range(chance.randint(1, 4)):
                may, over = expected(free, tokens + more)
                if not over:
                    pick = [*LETTERS, OPEN, *END_A, *END_B] if may is None else sorted(may)
                    more.append(chance.choice(pick))
            assert placed.validate_tokens([*more, 77])[: len(more)] == more
            assert placed.accept_tokens("r", list(more))
            tokens += more
        may, over = expected(free, tokens)
        assert (allowed(placed), placed.is_terminated()) == (may, over), (tokens, placed)
        start = begins_in(free, tokens)
        assert inner.seen == ([] if start is None else tokens[start:])


def test_what_does_not_follow_is_not_taken() -> None:
    placed = PlacedGrammar(Inner(), FreeText((END_B,)))
    assert placed.validate_tokens([5, 93, 0, 2]) == [5, 93, 0]
    assert placed.accept_tokens("r", [5, 93, 0])
    assert not placed.accept_tokens("r", [2])
