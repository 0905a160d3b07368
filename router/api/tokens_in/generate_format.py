"""The form of /inference/v1/generate: its body and its stream chunks, as vLLM's server makes them."""

import msgspec

from nodeapi.messages import TokenLogprob
from router.api.formats.chat_format import ChatFormatter, logprobs_of
from router.api.formats.formatter import DONE, raw_json, sse, usage_of
from router.api.formats.prompt_scores import finite
from router.client_answer import ClientAnswer, TextPiece
from router.text.tokenizer import Tokenizer


class GenerateFormatter(ChatFormatter):
    """One answer. `text`: the text is shown, and logprobs name tokens by theirs. `prompt`: the prompt's ids are."""

    def __init__(  # noqa: PLR0917 - as every formatter, and two more
        self, answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer, text: bool, prompt: bool
    ) -> None:
        super().__init__(answer, model, created, tokenizer)
        self._text, self._prompt_ids = text, answer.prompt_token_ids(0) if prompt else None
        self._shown_prompt = False
        self._wants_logprobs = answer.sampling.logprobs is not None

    def opening(self) -> list[bytes]:
        """Nothing."""
        return []

    def _chunk(self, piece: TextPiece) -> bytes:
        usage = usage_of(self._answer) if self._answer.shown.usage_so_far else None
        choice = self._choice(
            piece.index,
            piece.text,
            self._entries(piece),
            list(piece.token_ids),
            (piece.finish_reason, piece.stop_reason),
        )
        prompt: dict[str, object] = {}
        if self._prompt_ids is not None and not self._shown_prompt:
            prompt, self._shown_prompt = {"prompt_token_ids": self._prompt_ids}, True
        return sse({"request_id": self._answer.id, "usage": usage, **prompt, **self._mode(), "choices": [choice]})

    def closing(self) -> bytes:
        """See Formatter."""
        if not self._answer.shown.usage:
            return DONE
        last = {"request_id": self._answer.id, "usage": usage_of(self._answer), **self._mode(), "choices": []}
        return sse(last) + DONE

    def body(self) -> bytes:
        """See Formatter."""
        choices = [
            self._choice(
                index,
                "".join(choice.texts),
                choice.entries,
                choice.token_ids,
                (choice.finish_reason, choice.stop_reason),
            )
            for index, choice in enumerate(self._gathered)
        ]
        shown = {
            "request_id": self._answer.id,
            "model": self._model,
            "created": self._created,
            "usage": usage_of(self._answer),
            "prompt_logprobs": None,
            **self._prompt_logprobs(0),
            "prompt_token_id_logprobs": None,
            "prompt_token_ids": self._prompt_ids,
            "mm_placeholders": None,
            "metrics": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            **self._mode(),
            "choices": choices,
        }
        return msgspec.json.encode(shown)

    def _mode(self) -> dict[str, object]:
        return {"output_mode": "text" if self._text else "tokens"}

    def _choice(
        self,
        index: int,
        text: str,
        entries: list[msgspec.Raw],
        token_ids: list[int],
        end: tuple[str | None, str | int | None],
    ) -> dict[str, object]:
        logprobs: dict[str, object] | None = None
        if self._wants_logprobs:
            logprobs = logprobs_of(entries) if self._text else {"content": entries}
        choice: dict[str, object] = {
            "index": index,
            "finish_reason": end[0],
            "stop_reason": end[1],
            "token_ids": token_ids,
            "routed_experts": None,
            "sampling_mask": None,
            "weight_versions": None,
            "logprobs": logprobs,
        }
        return {**choice, "text": text} if self._text else choice

    def _entries(self, piece: TextPiece) -> list[msgspec.Raw]:
        if self._text:
            return super()._entries(piece)
        return [raw_json(_by_id(token_id, logprob)) for token_id, logprob in piece.logprobs]


def _by_id(token_id: int, logprob: TokenLogprob) -> dict[str, object]:
    """The token and the likeliest ones: itself first, then by their rank."""
    ranks = {other: rank for rank, (other, _) in enumerate(logprob.top, 1)}
    own = {"token_id": token_id, "logprob": finite(logprob.logprob), "rank": ranks.get(token_id)}
    others = [
        {"token_id": other, "logprob": finite(value), "rank": ranks[other]}
        for other, value in logprob.top
        if other != token_id
    ]
    return {**own, "top_logprobs": [own, *others][: max(1, len(logprob.top))]}
