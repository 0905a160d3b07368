"""The form of /v1/chat/completions: its body and its stream chunks."""

from collections.abc import Iterable

import msgspec

from router.api.formats.formatter import NamedLogprob, OpenAIFormatter, raw_json, stop_reason_of
from router.client_answer import TextPiece
from router.text.token_names import NamedToken


class ChatFormatter(OpenAIFormatter[msgspec.Raw]):
    """One answer of /v1/chat/completions."""

    def opening(self) -> list[bytes]:
        """The role of each choice, as OpenAI sends it first."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._event(
                "chat.completion.chunk",
                [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
                more={**self._prompt_token_ids(index), **self._prompt_text()},
            )
            for index in range(self._answer.num_choices)
        ]

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
        return self._body("chat.completion", choices, {**self._prompt_token_ids(0), **self._prompt_text()})

    def _message(self, index: int) -> dict[str, object]:
        return {"role": "assistant", "content": "".join(self._gathered[index].texts), "refusal": None}

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
