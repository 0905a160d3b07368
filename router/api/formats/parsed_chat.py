"""The form of /v1/chat/completions where a model's reasoning and calls are told apart from its answer."""

from collections.abc import Sequence

from router.api.formats.chat_format import ChatFormatter, logprobs_of
from router.api.formats.formatter import Formatter, stop_reason_of
from router.api.formats.read_choice import ReadChoice, ToolCall
from router.client_answer import ClientAnswer, TextPiece
from router.parsing.events import Content, Reasoning
from router.requests.spec import AnswerReading
from router.text.tokenizer import Tokenizer


def chat_formatter(answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer) -> Formatter:
    """Of one answer of /v1/chat/completions."""
    if answer.reading is None:
        return ChatFormatter(answer, model, created, tokenizer)
    return ParsedChatFormatter(answer, model, created, tokenizer, answer.reading)


class ParsedChatFormatter(ChatFormatter):
    """One answer of /v1/chat/completions in a dialect."""

    # A piece of text may be several deltas, as where a call ends and the next begins, or none, as where it may be the
    # beginning of a mark. Each delta is an event of its own. What a piece has beside its text, logprobs and token ids,
    # goes with the first, which then has a delta without anything if need be; the reason of the end comes alone.

    def __init__(
        self, answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer, reading: AnswerReading
    ) -> None:
        super().__init__(answer, model, created, tokenizer)
        self._only, self._thinks = reading.only, bool(reading.dialect.thinks)
        self._choices = [ReadChoice(answer, index, reading) for index in range(answer.num_choices)]

    def chunk(self, piece: TextPiece) -> bytes:
        """See Formatter."""
        choice, reason = self._choices[piece.index], piece.finish_reason
        deltas = choice.read(piece.text, is_last=reason is not None)
        beside = {"logprobs": logprobs_of(self._entries(piece)), **self._token_ids(piece.token_ids)}
        if not deltas and (beside["logprobs"] or piece.token_ids):
            deltas = [{}]
        events = []
        for delta in deltas:
            events.append(self._delta(piece.index, delta, None, beside))
            beside = {"logprobs": None}
        if reason is not None:
            events.append(
                self._delta(
                    piece.index,
                    {},
                    self._reason(reason, choice.whole_calls),
                    {"logprobs": None, **stop_reason_of(piece)},
                )
            )
        return b"".join(events)

    def _delta(self, index: int, delta: object, reason: str | None, beside: dict[str, object]) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": reason, **beside}
        return self._event("chat.completion.chunk", [choice])

    def take(self, piece: TextPiece) -> None:
        """See Formatter."""
        if piece.scores is None:
            self._choices[piece.index].read(piece.text, is_last=piece.finish_reason is not None)
        super().take(piece)

    def _message(self, index: int) -> dict[str, object]:
        choice = self._choices[index]
        calls, reasoning = choice.whole_calls, "".join(choice.texts[Reasoning])
        message: dict[str, object] = {
            "role": "assistant",
            "content": "".join([self._echo_of(index), *choice.texts[Content]])
            or (None if calls or self._thinks else ""),
            "refusal": None,
        }
        if reasoning:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls:
            message["tool_calls"] = [call.shown() for call in calls]
        return message

    def _finish_reason(self, index: int) -> str | None:
        reason = super()._finish_reason(index)
        return reason and self._reason(reason, self._choices[index].whole_calls)

    def _reason(self, reason: str, calls: Sequence[ToolCall]) -> str:
        """Of a call that had to be of one function OpenAI says that the answer has stopped."""
        return "tool_calls" if reason == "stop" and calls and not self._only else reason
