"""What a vLLM server answers on a leg: bodies, server-sent events and refusals, as our messages and errors. Pure.

Fields as in vLLM 0.32: `entrypoints/openai/completion/protocol.py`, `entrypoints/serve/engine/protocol.py`.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from kvcore.errors import (
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    KVFerryError,
    ModelNotFoundError,
    NodeUnavailableError,
    OverloadedError,
    PayloadTooLargeError,
)
from kvcore.types import TokenId
from nodeapi.messages import FinishReason, LegInfo, PrefillRequest, PrefillResult, TokenDelta, TokenLogprob
from nodeapi.prompt_logprobs import MOST_ENTRIES, PromptLogprobs, PromptRow

MAX_EVENT_BYTES = 8 << 20
"""The first event of each choice repeats the prompt's token ids."""
_NO_PARAMS = b"null"
_OTHER_LINES = (b":", b"event:", b"id:", b"retry:")
"""Of a stream of events, beside its data."""
_MAX_SAID = 200
_TOKEN = "token_id:"


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None

    def cached_tokens(self, prompt_tokens: int, others: int = 0) -> int | None:
        """Of a prompt of so many tokens, of which the server was told `others` behind it, too. None: the server was not
        started with --enable-prompt-tokens-details, or says what cannot be."""
        cached = self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None
        return min(cached, prompt_tokens) if cached is not None and 0 <= cached <= prompt_tokens + others else None


class _Error(msgspec.Struct):
    message: str = ""
    code: int | str | None = None
    param: str | None = None


class _Whole(msgspec.Struct):
    usage: _Usage
    kv_transfer_params: msgspec.Raw = msgspec.Raw(_NO_PARAMS)


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[TokenId] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: TokenId | str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _Refused(msgspec.Struct):
    error: _Error | None = None
    message: str = ""
    """Where servers before 0.10 had it."""


class _Score(msgspec.Struct):
    logprob: float
    rank: int


class _ScoredChoice(msgspec.Struct):
    prompt_logprobs: list[msgspec.Raw]


class _Scored(msgspec.Struct):
    choices: list[_ScoredChoice]


_whole = msgspec.json.Decoder(_Whole)
_scored = msgspec.json.Decoder(_Scored)
_scores = msgspec.json.Decoder(dict[str, _Score])
_event = msgspec.json.Decoder(_Event)
_token = msgspec.json.Decoder(TokenId)


def prefill_result(raw: bytes, request: PrefillRequest, url: str) -> PrefillResult:
    """A prefill leg's answer, with what it says for the decode leg verbatim. Raises NodeUnavailableError."""
    try:
        reply = _whole.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NodeUnavailableError(f"{url} sent an answer that cannot be read: {error}") from error
    params = bytes(reply.kv_transfer_params)
    prompt_tokens = len(request.prompt_token_ids)
    cached = reply.usage.cached_tokens(prompt_tokens) or 0
    return PrefillResult(
        request_id=request.request_id,
        cached_tokens=cached,
        computed_tokens=prompt_tokens - cached,
        stored_chunks=0,
        handoff_params=b"" if params == _NO_PARAMS else params,
    )


def prompt_scores(raw: bytes, prompt: Sequence[int], top: int, url: str) -> Iterator[PromptLogprobs]:
    """The logprobs of a prompt's tokens of a whole answer, piece by piece: reading all of a long one takes a second.
    Raises NodeUnavailableError."""
    try:
        told = _scored.decode(raw).choices[0].prompt_logprobs
        if len(told) != len(prompt):
            raise NodeUnavailableError(f"{url} told logprobs of {len(told)} tokens for a prompt of {len(prompt)}")
        step = max(1, MOST_ENTRIES // (1 + top))
        for start in range(1, len(prompt), step):
            part = zip(prompt[start : start + step], told[start : start + step], strict=True)
            yield PromptLogprobs.pack(start, top, [_prompt_row(token, _scores.decode(one), top) for token, one in part])
    except (msgspec.DecodeError, LookupError, ValueError, OverflowError, struct.error) as error:
        raise NodeUnavailableError(f"{url} sent logprobs of a prompt that cannot be read: {error}") from error


def _prompt_row(token: int, told: Mapping[str, _Score], top: int) -> PromptRow:
    """Raises LookupError where one is missing, ValueError for what is no token id."""
    best = sorted((score.rank, int(name), score.logprob) for name, score in told.items() if score.rank <= top)
    if len(best) != top:
        raise LookupError(f"{len(best)} tokens in the place of one, not {top}")
    own = told[str(token)]
    return PromptRow(token, own.logprob, own.rank, [(other, logprob) for _, other, logprob in best])


class CompletionStream:
    """One decode leg's server-sent events, bytes in and deltas out.

    The last finish is held back until the usage that follows it has come, which says what was cached; `flush` gives it
    out without. Every method raises the error that the server sent, or NodeUnavailableError for what cannot be read.
    """

    def __init__(
        self, *, n: int, logprobs: int | None, url: str, listed: Sequence[int] = (), told: tuple[int, int] = (0, 0)
    ) -> None:
        """`listed`: tokens that logprobs are of, instead of the likeliest. `told`: how many tokens the prompt has, and
        how many were generated before, which are the end of the server's prompt."""
        self._told = told
        self._open = set(range(n))
        self._logprobs = logprobs
        self._listed = [f"{_TOKEN}{token}" for token in listed]
        self._url = url
        self._rest = self._stray = b""
        self._last: TokenDelta | None = None
        self._begun = False
        self.ended = False
        """The server said that it is done."""

    @property
    def holds(self) -> bool:
        """Whether only the usage is still to come."""
        return self._last is not None

    def feed(self, data: bytes) -> list[TokenDelta]:
        """The deltas that these bytes complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise NodeUnavailableError(f"{self._url} sent an event of more than {MAX_EVENT_BYTES} bytes")
        deltas: list[TokenDelta] = []
        for line in lines:
            if not line.startswith(b"data:"):  # the empty line between two events, a comment that keeps alive
                self._note_stray(line)
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.ended = True
                return deltas + self.flush()
            deltas += self._one(payload)
        return deltas

    def flush(self) -> list[TokenDelta]:
        """What was held back."""
        last, self._last = self._last, None
        return [last] if last is not None else []

    def check_broken_off(self) -> None:
        """The answer is over. Raises NodeUnavailableError where it was no stream of events at all."""
        if not self._rest.startswith(b"data:"):
            self._note_stray(self._rest)
        if self._stray and not self._begun:
            said = self._stray[:_MAX_SAID].decode(errors="replace")
            raise NodeUnavailableError(f"{self._url} answered no stream of events, but {said!r}")

    def _note_stray(self, line: bytes) -> None:
        if line.strip() and not line.startswith(_OTHER_LINES):
            self._stray = self._stray or line.strip()

    def _one(self, payload: bytes) -> list[TokenDelta]:
        try:
            event = _event.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NodeUnavailableError(f"{self._url} sent an event that cannot be read: {error}") from error
        if (said := event.error) is not None:
            if self._begun:  # then it is no longer the request's fault, whatever code it has
                raise EngineError(f"{self._url} broke a stream off: {said.message}")
            raise _meaning(said.code if isinstance(said.code, int) else 500, said.message, said.param, self._url)
        deltas: list[TokenDelta] = []
        for choice in event.choices:
            self._begun = True
            if choice.index not in self._open:
                raise EngineError(f"{self._url} sent something of sequence {choice.index}, which is not under way")
            delta = self._delta(choice)
            if delta.finish_reason is not None:
                self._open.discard(delta.index)
            if self._open:
                deltas.append(delta)
            else:
                self._last = delta
        return deltas if event.usage is None or self._last is None else [*deltas, self._with_info(event.usage)]

    def _with_info(self, usage: _Usage) -> TokenDelta:
        (last,) = self.flush()
        if (cached := usage.cached_tokens(*self._told)) is None:
            return last
        info = LegInfo(cached_tokens=cached, computed_tokens=self._told[0] - cached)
        return msgspec.structs.replace(last, info=info)

    def _delta(self, choice: _Choice) -> TokenDelta:
        if choice.token_ids is None:
            raise EngineError(f"{self._url} sends no token ids: vLLM knows return_token_ids since 0.10.2")
        reason, stop_token_id = _ending(choice, self._url)
        return TokenDelta(
            index=choice.index,
            token_ids=choice.token_ids,
            logprobs=None if self._logprobs is None else self._token_logprobs(choice),
            finish_reason=reason,
            stop_token_id=stop_token_id,
        )

    def _token_logprobs(self, choice: _Choice) -> list[TokenLogprob]:
        """One a token. vLLM adds the sampled token to the likeliest ones where it is none of them."""
        given, wanted = choice.logprobs or _Logprobs(), self._logprobs or 0
        logprobs: list[TokenLogprob] = []
        for logprob, others in zip(given.token_logprobs, given.top_logprobs, strict=False):
            told = others or {}
            likeliest = sorted(told.items(), key=lambda pair: -pair[1])[:wanted]
            named = [(name, told.get(name, -9999.0)) for name in self._listed] or likeliest
            top = [(self._token_id(name), value) for name, value in named]
            logprobs.append(TokenLogprob(logprob=-9999.0 if logprob is None else logprob, top=top))
        return logprobs

    def _token_id(self, name: str) -> int:
        digits = name.removeprefix(_TOKEN)
        try:
            return _token.decode(digits if digits != name else "")
        except msgspec.DecodeError:
            raise NodeUnavailableError(f"{self._url} names a token {name[:40]!r}, not {_TOKEN}ID") from None


def _ending(choice: _Choice, url: str) -> tuple[FinishReason | None, int | None]:
    """vLLM's reason in ours, and the token that ended the sequence. `stop_reason` is a stop token's id, and None where
    the end-of-sequence token ended it."""
    match choice.finish_reason:
        case None:
            return None, None
        case "length":
            return FinishReason.LENGTH, None
        case "abort":
            return FinishReason.ABORT, None
        case "stop":
            last = choice.token_ids[-1] if choice.token_ids else None
            return FinishReason.STOP, choice.stop_reason if isinstance(choice.stop_reason, int) else last
        case other:
            raise EngineError(f"{url} ended a sequence by {other!r}")


def refusal(status: int, raw: bytes, url: str) -> KVFerryError:
    """What an answer with this status of 400 or more means."""
    try:
        body = msgspec.json.decode(raw, type=_Refused)
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = _Refused()
    error = body.error or _Error(message=body.message)
    return _meaning(status, error.message, error.param, url)


def _meaning(status: int, message: str, param: str | None, url: str) -> KVFerryError:
    said = f"{url} answered {status}" + (f": {message}" if message else "")
    if status in (401, 403):
        return NodeUnavailableError(f"{said}; put the server's key into VLLM_API_KEY of the router")
    if status in (429, 503, 529):
        return OverloadedError(said)
    if status in (502, 504) or (status == 400 and message == "Client disconnected"):  # it is stopping
        return NodeUnavailableError(said)
    if status >= 500:
        return EngineError(said)
    if status == 404:
        return ModelNotFoundError(said, param="model")
    if status == 413:
        return PayloadTooLargeError(said)
    kind = ContextLengthError if "context length" in message or "max_model_len" in message else InvalidRequestError
    return kind(message or said, param=param)
