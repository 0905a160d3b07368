"""What a formatter is, and what those of OpenAI's endpoints share: from pieces of text to bodies and stream chunks.

A formatter has state for one answer; it does no I/O. `chat_format` and `completion_format` own their endpoint's form.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

import msgspec

from kvcore.errors import KVFerryError
from nodeapi.prompt_logprobs import PromptLogprobs
from router.api.formats.prompt_scores import NamedLogprob, NamedRow, ScoredPrompt, by_id, finite
from router.api.http_errors import reply_of
from router.client_answer import ClientAnswer, TextPiece
from router.text.token_names import TokenNames
from router.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()
_MARK = "\0text\0"
"""In the place of a text."""
Entry = TypeVar("Entry")


class PromptTokensDetails(msgspec.Struct):
    """`cached_tokens`: prompt tokens that no node computed for this request, and that are exact. The others are told of
    prompts that name documents: `approximate_tokens`, reused of documents that were computed elsewhere, and
    `computed_tokens`, all the rest of the prompt."""

    cached_tokens: int
    approximate_tokens: int | msgspec.UnsetType = msgspec.UNSET
    computed_tokens: int | msgspec.UnsetType = msgspec.UNSET


class CompletionTokensDetails(msgspec.Struct):
    """Of answers in which reasoning is told apart."""

    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Of one answer, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET


def prompt_details(answer: ClientAnswer) -> PromptTokensDetails:
    """Final once the answer's pieces have ended."""
    cached, approximate = answer.cached_tokens, answer.approximate_tokens
    if approximate is None:
        return PromptTokensDetails(cached)
    return PromptTokensDetails(cached, approximate, max(0, answer.prompt_tokens - cached - approximate))


def usage_of(answer: ClientAnswer) -> Usage:
    """Final once the answer's pieces have ended."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    reasoning = answer.reasoning_tokens
    thought = msgspec.UNSET if reasoning is None else CompletionTokensDetails(reasoning)
    return Usage(prompt, completion, prompt + completion, prompt_details(answer), thought)


def sse(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(body) + b"\n\n"


class Formatter(Protocol):
    """Makes the bodies and stream chunks of one answer, as its endpoint has them."""

    def opening(self) -> list[bytes]:
        """Events before the first piece."""
        ...

    def chunk(self, piece: TextPiece) -> bytes:
        """The event of one piece."""
        ...

    def closing(self) -> bytes:
        """Events after the last piece: usage, if the client asked for it, and the mark of the end."""
        ...

    def failure(self, error: KVFerryError) -> bytes:
        """The event of an error, which is the last one."""
        ...

    def take(self, piece: TextPiece) -> None:
        """One more piece of an answer that is not streamed: most of the work, so that it is done while others come."""
        ...

    def body(self) -> bytes:
        """The body of what was taken."""
        ...


class GatheredChoice(msgspec.Struct, Generic[Entry]):
    """A choice of an answer in one body, as far as it has come."""

    texts: list[str] = []
    entries: list[Entry] = []
    token_ids: list[int] = []
    finish_reason: str | None = None
    stop_reason: str | int | None = None


def stop_reason_of(piece: TextPiece) -> dict[str, object]:
    """In the last chunk of a choice, as vLLM has it."""
    return {"stop_reason": piece.stop_reason} if piece.finish_reason is not None else {}


def raw_json(value: object) -> msgspec.Raw:
    """Encoded now, for a body that is made later."""
    return msgspec.Raw(_encoder.encode(value))


class OpenAIFormatter(Generic[Entry]):
    """The fields that OpenAI's answers have in common; a subclass makes their choices."""

    def __init__(self, answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer) -> None:
        self._answer = answer
        self._model = model
        self._created = created
        self._tokenizer = tokenizer
        self._names: dict[int, TokenNames] = {}
        """By choice, of those that have had logprobs."""
        self._gathered: list[GatheredChoice[Entry]] = [GatheredChoice() for _ in range(answer.num_choices)]
        self._around: dict[int, list[bytes]] = {}
        """By choice: what its events of text alone have before and after the text's JSON."""
        self._prompt: tuple[list[int], msgspec.Raw] | None = None
        """The last one that was shown, and its JSON."""
        self._prompts: dict[int, ScoredPrompt] = {}
        """By place, of those of which something is told."""
        echoes = answer.shown.scoring.echoes
        self._echoes = [
            tokenizer.decode(prompt, skip_special_tokens=False) if text is None else text
            for prompt, text in zip(answer.prompts if echoes else (), echoes or (), strict=False)
        ]
        """What each answer begins with, one a prompt; empty: nothing."""

    def _event(
        self,
        kind: str,
        choices: list[dict[str, object]],
        usage: Usage | None = None,
        more: Mapping[str, object] = MappingProxyType({}),
    ) -> bytes:
        body: dict[str, object] = {
            "id": self._answer.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }
        if self._answer.shown.usage:
            body["usage"] = usage_of(self._answer) if self._answer.shown.usage_so_far else usage
        return sse(body)

    def chunk(self, piece: TextPiece) -> bytes:
        """See Formatter. Events of text alone differ in it and in nothing else, so they are cut once around it."""
        shown = self._answer.shown
        if not piece.text or piece.logprobs or piece.finish_reason or shown.token_ids or shown.usage_so_far:
            return self._chunk(piece)
        around = self._around.get(piece.index)
        if around is None:
            whole = self._chunk(TextPiece(piece.index, _MARK))
            self._around[piece.index] = around = whole.split(_encoder.encode(_MARK))
        return _encoder.encode(piece.text).join(around) if len(around) == 2 else self._chunk(piece)

    def _chunk(self, piece: TextPiece) -> bytes:
        """What a subclass makes of any piece."""
        raise NotImplementedError

    def _closing(self, kind: str) -> bytes:
        return (self._event(kind, [], usage_of(self._answer)) if self._answer.shown.usage else b"") + DONE

    def _body(
        self, kind: str, choices: list[dict[str, object]], more: Mapping[str, object] = MappingProxyType({})
    ) -> bytes:
        return _encoder.encode(
            {
                "id": self._answer.id,
                "object": kind,
                "created": self._created,
                "model": self._model,
                "choices": choices,
                "usage": usage_of(self._answer),
                **more,
            }
        )

    def _named(self, piece: TextPiece) -> list[NamedLogprob]:
        """The tokens of the piece with their logprobs. Once a piece, in their order."""
        if (names := self._names.get(piece.index)) is None:
            names = self._names[piece.index] = TokenNames(self._tokenizer)
        named = []
        for token_id, logprob in piece.logprobs:
            told = logprob.top
            if self._answer.shown.scoring.listed:  # the sampled one is among them, and each once, as vLLM has it
                told = list({token_id: logprob.logprob, **dict(told)}.items())
            ids = [other for other, _ in told]
            token, others = names.step(token_id, ids)
            num_chars = len(token.text)
            if self._answer.shown.tokens_as_ids:
                token, *others = [by_id(i, named) for i, named in zip((token_id, *ids), (token, *others), strict=True)]
            top = [(other, finite(value)) for other, (_, value) in zip(others, told, strict=True)]
            named.append(NamedLogprob(token, num_chars, finite(logprob.logprob), top))
        return named

    def _echo_of(self, index: int) -> str:
        return self._echoes[self._answer.prompt_of(index)] if self._echoes else ""

    def failure(self, error: KVFerryError) -> bytes:
        """See Formatter."""
        return sse(reply_of(error))

    def take(self, piece: TextPiece) -> None:
        """See Formatter."""
        if piece.scores is not None:
            self._take_scores(self._answer.prompt_of(piece.index), piece.scores)
            return
        gathered = self._gathered[piece.index]
        gathered.texts.append(piece.text)
        gathered.entries += self._entries(piece)
        gathered.token_ids += piece.token_ids
        if piece.finish_reason is not None:
            gathered.finish_reason, gathered.stop_reason = piece.finish_reason, piece.stop_reason

    def _take_scores(self, prompt: int, scores: PromptLogprobs) -> list[NamedRow]:
        """Of the next tokens of the prompt at this place."""
        return self._scored(prompt).take(scores)

    def _scored(self, prompt: int) -> ScoredPrompt:
        if (scored := self._prompts.get(prompt)) is None:
            gathers = self._answer.shown.scoring.prompt_logprobs
            scored = self._prompts[prompt] = ScoredPrompt(self._tokenizer, gathers=gathers)
        return scored

    def _prompt_logprobs(self, prompt: int) -> dict[str, object]:
        return {"prompt_logprobs": self._scored(prompt).json()} if self._answer.shown.scoring.prompt_logprobs else {}

    def _entries(self, piece: TextPiece) -> list[Entry]:
        """What a subclass shows of each token's logprobs."""
        raise NotImplementedError

    def _token_ids(self, token_ids: Sequence[int]) -> dict[str, object]:
        return {"token_ids": list(token_ids)} if self._answer.shown.token_ids else {}

    def _prompt_text(self) -> dict[str, object]:
        text = self._answer.shown.prompt_text
        return {} if text is None else {"prompt_text": text}

    def _prompt_token_ids(self, index: int) -> dict[str, object]:
        if not self._answer.shown.token_ids:
            return {}
        ids = self._answer.prompt_token_ids(index)
        if self._prompt is None or self._prompt[0] is not ids:  # a prompt's choices come one after the other
            self._prompt = ids, raw_json(ids)
        return {"prompt_token_ids": self._prompt[1]}
