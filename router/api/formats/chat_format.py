"""The form of /v1/chat/completions: its body and its stream chunks."""

from collections.abc import Iterable

import msgspec

from router.api.formats.formatter import OpenAIFormatter, raw_json, stop_reason_of
from router.api.formats.prompt_scores import NamedLogprob
from router.client_answer import TextPiece
from router.text.token_names import NamedToken


class ChatFormatter(OpenAIFormatter[msgspec.Raw]):
    """One answer of /v1/chat/completions."""

    def opening(self) -> list[bytes]:
        """The role of each choice, as OpenAI sends it first."""
        choices = range(self._answer.num_choices)
        begin = {"role": "assistant", "content": ""}
        events = [self._begin(index, begin, self._prompt_token_ids(index) | self._prompt_text()) for index in choices]
        echoes = [(index, echo) for index in choices if (echo := self._echo_of(index))]
        events += [self._begin(index, {"content": echo}, {}) for index, echo in echoes]
        return events

    def _begin(self, index: int, delta: dict[str, str], more: dict[str, object]) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._event("chat.completion.chunk", [choice], more=more)

    def _chunk(self, piece: TextPiece) -> bytes:
        choice: dict[str, object] = {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": logprobs_of(self._entries(piece)),
            "finish_reason": piece.finish_reason,
            **stop_reason_of(piece),
            **self._token_ids(piece.token_ids),
        }
        return self._event("chat.completion.chunk", [choice])

    def closing(self) -> bytes:
        """See Formatter."""
        return self._closing("chat.completion.chunk")

    def body(self) -> bytes:
        """See Formatter."""
        choices: list[dict[str, object]] = [
            {
                "index": index,
                "message": self._message(index),
                "logprobs": logprobs_of(choice.entries),
                "finish_reason": self._finish_reason(index),
                "stop_reason": choice.stop_reason,
                **self._token_ids(choice.token_ids),
            }
            for index, choice in enumerate(self._gathered)
        ]
        is_one = len(self._answer.prompts) == 1
        of_prompt = {**self._prompt_logprobs(0), **self._prompt_token_ids(0), **self._prompt_text()} if is_one else {}
        return self._body("chat.completion", choices, of_prompt)

    def _message(self, index: int) -> dict[str, object]:
        texts = [self._echo_of(index), *self._gathered[index].texts]
        return {"role": "assistant", "content": "".join(texts), "refusal": None}

    def _finish_reason(self, index: int) -> str | None:
        return self._gathered[index].finish_reason

    def _entries(self, piece: TextPiece) -> list[msgspec.Raw]:
        return token_entries(self._named(piece)) if piece.logprobs else []


def token_entries(tokens: Iterable[NamedLogprob]) -> list[msgspec.Raw]:
    """What is shown of each token's logprobs."""
    return [
        raw_json({**_entry(named.token, named.logprob), "top_logprobs": [_entry(*other) for other in named.top]})
        for named in tokens
    ]


def logprobs_of(entries: list[msgspec.Raw]) -> dict[str, object] | None:
    """The `logprobs` of a choice."""
    return {"content": entries, "refusal": None} if entries else None


def _entry(token: NamedToken, logprob: float) -> dict[str, object]:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.raw)}
