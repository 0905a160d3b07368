"""A stream's events of text alone are cut from one of them: each reads as if it had been made by itself."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api.formats.chat_format import ChatFormatter
from router.api.formats.completion_format import CompletionFormatter
from router.api.formats.formatter import OpenAIFormatter
from router.client_answer import TextPiece
from router.requests.spec import ShownFields
from router.text.tokenizer import ByteTokenizer

ENDS = st.sampled_from([None, None, "stop"])
Kind = type[ChatFormatter] | type[CompletionFormatter]


def formatter(kind: Kind, model: str, **shown: bool) -> OpenAIFormatter[Any]:
    counts = {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "cached_tokens": 1,
        "num_choices": 2,
        "approximate_tokens": None,
        "reasoning_tokens": None,
    }
    ids = {"prompt_token_ids": lambda _: [1, 2, 3], "prompts": [[1, 2, 3]]}
    asked = SimpleNamespace(id="x-1", shown=ShownFields(**shown), **ids, **counts)
    return kind(asked, model, 1, ByteTokenizer(256))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [ChatFormatter, CompletionFormatter])
@given(
    pieces=st.lists(st.builds(TextPiece, st.integers(0, 1), st.text(max_size=8), finish_reason=ENDS)),
    model=st.sampled_from(["m", 'a "name"', "\0text\0"]),
    shown=st.sampled_from([{}, {"usage": True}, {"usage": True, "usage_so_far": True}, {"token_ids": True}]),
)
def test_each_event_is_as_if_made_by_itself(
    kind: Kind, pieces: list[TextPiece], model: str, shown: dict[str, bool]
) -> None:
    quick, plain = formatter(kind, model, **shown), formatter(kind, model, **shown)
    assert [quick.chunk(piece) for piece in pieces] == [plain._chunk(piece) for piece in pieces]
