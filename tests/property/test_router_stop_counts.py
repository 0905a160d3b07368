"""Stop strings in outputs however they arrive: text, tokens, logprobs and usage are those of the tokens one by one."""

from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeapi.messages import FinishReason, TokenLogprob
from nodeapi.sampling import SamplingParams
from router.client_answer import AnswerLimits, ClientAnswer, TextPiece
from router.requests.events import Emit
from router.requests.run import RequestRun
from router.requests.spec import AnswerRequest, RequestSpec, ShownFields
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import ByteTokenizer

EURO = "€".encode()
PIECES = [b"a", b"b", b"ab", b"bab", b"", *(EURO[i : i + 1] for i in range(3)), b"a" + EURO[:1], EURO[1:] + b"b"]
"""Tokens of several characters, of none, and of parts of one."""
STOP_TOKEN = len(PIECES)


class Pieces(ByteTokenizer):
    """Token `i` is `PIECES[i]`; the stop token has no text."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == STOP_TOKEN else PIECES[token_id]


class Arrived(RequestRun):
    """A run whose outputs have all arrived before the first is read, as a batch of a loaded engine has."""

    def __init__(self, emits: list[Emit]) -> None:
        self.emits = emits
        self.stops: dict[int, int] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Emit]:
        for emit in self.emits:
            if emit.index not in self.stops:
                yield emit

    def stop(self, index: int, num_tokens: int) -> None:
        self.stops[index] = num_tokens


def read(
    emits: list[Emit], stops: list[str], *, n: int, min_tokens: int
) -> tuple[list[TextPiece], ClientAnswer, Arrived]:
    run = Arrived(emits)
    sampling = SamplingParams(max_tokens=99, n=n, min_tokens=min_tokens)
    request = AnswerRequest([RequestSpec("r", [0], sampling)], stops, ShownFields(token_ids=True))
    answer = ClientAnswer(Pieces(512), [run], request, AnswerLimits())

    async def gather() -> list[TextPiece]:
        return [piece async for piece in answer.pieces()]

    with pytest.raises(StopIteration) as ended:  # nothing in it waits, so that it needs no loop
        gather().send(None)
    return ended.value.value, answer, run


def right(ids: list[int], stops: list[str], min_tokens: int) -> tuple[str, int | None]:
    """(the text, the number of tokens up to a stop string or None), by looking at the text after each token."""
    detokenizer, text, ends = Detokenizer(Pieces(512), [0]), "", [0]
    for token_id in ids:
        text += detokenizer.feed([token_id])
        ends.append(len(text))
    matches = [
        (at + len(stop), at)
        for stop in stops
        for at in range(ends[min(min_tokens, len(ids))] - len(stop) + 1, len(text))
        if at >= 0 and text.startswith(stop, at)
    ]
    if not matches or min_tokens >= len(ids):
        return text, None
    end, begin = min(matches)
    return text[:begin], next(count for count, reached in enumerate(ends) if reached >= end)


def batches(index: int, ids: list[int], cuts: set[int], *, stop_token: bool) -> list[Emit]:
    ids = [*ids, STOP_TOKEN] if stop_token else ids
    borders = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    emits: list[Emit] = []
    for a, b in pairwise(borders) if ids else [(0, 0)]:
        reason = (FinishReason.STOP if stop_token else FinishReason.LENGTH) if b == len(ids) else None
        logprobs = [TokenLogprob(logprob=-float(i)) for i in range(a, b)]
        emits.append(Emit(index, ids[a:b], logprobs, reason, STOP_TOKEN if reason is FinishReason.STOP else None))
    return emits


tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=12)
some_stops = st.lists(st.text("ab€\ufffd", min_size=1, max_size=4), max_size=3)


@settings(max_examples=100, deadline=None)
@given(
    completions=st.lists(st.tuples(tokens, st.sets(st.integers(1, 12)), st.booleans()), min_size=1, max_size=2),
    stops=some_stops,
    min_tokens=st.integers(0, 5),
)
def test_what_counts_does_not_depend_on_how_many_tokens_came_at_once(
    completions: list[tuple[list[int], set[int], bool]], stops: list[str], min_tokens: int
) -> None:
    emits = [
        emit
        for index, (ids, cuts, stop_token) in enumerate(completions)
        for emit in batches(index, ids, cuts, stop_token=stop_token)
    ]
    pieces, answer, run = read(emits, stops, n=len(completions), min_tokens=min_tokens)
    total = 0
    for index, (ids, _, stop_token) in enumerate(completions):
        text, stopped_at = right(ids, stops, min_tokens)
        shown = [*ids, STOP_TOKEN] if stop_token else ids
        expected = shown if stopped_at is None else ids[:stopped_at]
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == text
        assert [token for piece in own for token in piece.token_ids] == expected
        entries = [(token, entry.logprob) for piece in own for token, entry in piece.logprobs]
        assert entries == [(token, -float(at)) for at, token in enumerate(expected)]
        reasons = [piece.finish_reason for piece in own if piece.finish_reason]
        assert reasons == ["stop" if stop_token or stopped_at is not None else "length"]
        assert run.stops.get(index) == stopped_at
        total += len(expected)
    assert answer.completion_tokens == total
