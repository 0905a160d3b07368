"""The form of /v1/completions: its body and its stream chunks."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from nodeapi.prompt_logprobs import PromptLogprobs
from router.api.formats.formatter import OpenAIFormatter, raw_json, stop_reason_of
from router.api.formats.prompt_scores import NamedLogprob, NamedRow
from router.client_answer import ClientAnswer, TextPiece
from router.text.tokenizer import Tokenizer


class CompletionEntry(NamedTuple):
    """Of one token's logprobs, as this endpoint shows them. `top`: JSON."""

    token: str
    logprob: float | None
    top: msgspec.Raw | None
    offset: int


class CompletionFormatter(OpenAIFormatter[CompletionEntry]):
    """One answer of /v1/completions."""

    def __init__(self, answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer) -> None:
        super().__init__(answer, model, created, tokenizer)
        self._offsets = [0] * answer.num_choices
        self._begun: set[int] = set()
        """Choices that have said something."""
        for number, text in enumerate(self._echoes):
            for index in answer.choices_of(number):
                self._gathered[index].texts.append(text)
                self._gathered[index].entries += self._first_token(index, answer.prompts[number][0])

    def opening(self) -> list[bytes]:
        """What is echoed."""
        echoed = [index for number in range(len(self._echoes)) for index in self._answer.choices_of(number)]
        return [self._echo(index, self._gathered[index].texts[0], self._gathered[index].entries) for index in echoed]

    def _echo(self, index: int, text: str, entries: list[CompletionEntry]) -> bytes:
        shown: dict[str, object] = {"text": text, "logprobs": _logprobs(entries), "finish_reason": None}
        return self._event("text_completion", [self._choice(index, shown, ())])

    def _first_token(self, index: int, token_id: int) -> list[CompletionEntry]:
        """Of a prompt: nothing stands before it by which it could be likely."""
        if self._answer.shown.scoring.echo_logprobs is None:
            return []
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        self._offsets[index] = len(text)
        name = f"token_id:{token_id}" if self._answer.shown.tokens_as_ids else text
        return [CompletionEntry(name, None, None, 0)]

    def _take_scores(self, prompt: int, scores: PromptLogprobs) -> list[NamedRow]:
        rows = super()._take_scores(prompt, scores)
        entries = self._echoed(prompt, rows)
        for index in self._answer.choices_of(prompt):
            self._gathered[index].entries += entries
        return rows

    def _echoed(self, prompt: int, rows: list[NamedRow]) -> list[CompletionEntry]:
        """Of tokens of a prompt that are echoed: they are the same for all its choices."""
        scoring, choices = self._answer.shown.scoring, self._answer.choices_of(prompt)
        if scoring.echo_logprobs is None:
            return []
        most = None if scoring.listed else scoring.echo_logprobs
        entries = [self._entry(choices[0], row.logprob(most, as_id=self._answer.shown.tokens_as_ids)) for row in rows]
        for index in choices:
            self._offsets[index] = self._offsets[choices[0]]
        return entries

    def _chunk(self, piece: TextPiece) -> bytes:
        if piece.scores is not None:
            prompt = self._answer.prompt_of(piece.index)
            entries = self._echoed(prompt, super()._take_scores(prompt, piece.scores))
            return b"".join(self._echo(index, "", entries) for index in self._answer.choices_of(prompt))
        shown: dict[str, object] = {
            "text": piece.text,
            "logprobs": _logprobs(self._entries(piece)),
            "finish_reason": piece.finish_reason,
            **stop_reason_of(piece),
        }
        return self._event("text_completion", [self._choice(piece.index, shown, piece.token_ids)])

    def closing(self) -> bytes:
        """See Formatter."""
        return self._closing("text_completion")

    def body(self) -> bytes:
        """See Formatter."""
        choices = [
            self._choice(
                index,
                {
                    "text": "".join(choice.texts),
                    "logprobs": _logprobs(choice.entries),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                    **self._prompt_logprobs(self._answer.prompt_of(index)),
                },
                choice.token_ids,
            )
            for index, choice in enumerate(self._gathered)
        ]
        return self._body("text_completion", choices)

    def _choice(self, index: int, shown: dict[str, object], token_ids: Sequence[int]) -> dict[str, object]:
        first = index not in self._begun
        self._begun.add(index)
        ids = {**self._token_ids(token_ids), **(self._prompt_token_ids(index) if first else {})}
        return {"index": index, **shown, **ids}

    def _entries(self, piece: TextPiece) -> list[CompletionEntry]:
        return [self._entry(piece.index, named) for named in (self._named(piece) if piece.logprobs else ())]

    def _entry(self, index: int, named: NamedLogprob) -> CompletionEntry:
        offset = self._offsets[index]
        self._offsets[index] += named.num_chars
        return CompletionEntry(named.token.text, named.logprob, raw_json(_by_text(named)), offset)


def _logprobs(entries: list[CompletionEntry]) -> dict[str, object] | None:
    if not entries:
        return None
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [entry.top for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _by_text(named: NamedLogprob) -> dict[str, float]:
    """The token itself and the likeliest ones; of several that have the same text, the first."""
    shown = {named.token.text: named.logprob}
    for token, logprob in named.top:
        shown.setdefault(token.text, logprob)
    return shown
