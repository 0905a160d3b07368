"""From neutral requests to pieces of text: prompts to tokens, runs of the dispatcher, detokenizing, stop strings.

Owns the join of several prompts' runs into one stream. Knows no HTTP and no surface's field names.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial

import msgspec

from kvcore.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    NodeUnavailableError,
    OverloadedError,
)
from nodeapi.messages import FinishReason, TokenLogprob
from router.admission.gate import Admission
from router.nodes.cluster import Cluster
from router.requests.dispatch import Dispatcher
from router.requests.events import Emit
from router.requests.run import RequestRun
from router.requests.spec import AnswerRequest, ChatPrompt, FieldNames, Prompt, RequestSpec, TextPrompt, TokenPrompt
from router.routing.decision import Decision
from router.text.detokenizer import Detokenizer, StopChecker
from router.text.tokenizer import Runner, Tokenizer


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """Bounds of one answer."""

    inline_chars: int = 8 << 10
    """Longer texts, all prompts of a request together, are rendered and encoded beside the event loop."""
    text_threads: int = 4
    """Texts that are so at the same time; others wait, …"""
    max_waiting_chars: int = 64 << 20
    """… of so many characters in all."""
    max_choices: int = 128
    max_queued_pieces: int = 64
    """Pieces of several runs that wait for a slow client before the runs are read no further."""


class TextPiece(msgspec.Struct, frozen=True):
    """New text of one choice. `logprobs`: (token id, its logprob) of the tokens of this piece. `token_ids`: as the
    engine gave them; empty unless the client asked for them. Of both a final stop token is part."""

    index: int
    text: str
    logprobs: Sequence[tuple[int, TokenLogprob]] = ()
    finish_reason: str | None = None
    token_ids: Sequence[int] = ()


@dataclass(slots=True)
class _TextChoice:
    """One completion as it is read. `num_tokens` of it have been."""

    detokenizer: Detokenizer
    stops: StopChecker
    min_tokens: int
    num_tokens: int = 0

    def read(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """(the text that these tokens complete, whether a stop string was found). Tokens after the one that completes
        the stop string are not read, so that what counts does not depend on how many came at once."""
        if not self.stops.stops:
            self.num_tokens += len(token_ids)
            return self.detokenizer.feed(token_ids), False
        pieces: list[str] = []
        stop_found = False
        for token_id in token_ids:
            self.num_tokens += 1
            text, stop_found = self.stops.feed(self.detokenizer.feed([token_id]), may_stop=self._may_stop)
            pieces.append(text)
            if stop_found:
                break
        return "".join(pieces), stop_found

    def read_end(self) -> tuple[str, bool]:
        """What is still held back after the last token: an incomplete character, whose text can complete a stop string,
        and then the beginning of a stop string that will not be completed."""
        text, stop_found = self.stops.feed(self.detokenizer.flush(), may_stop=self._may_stop)
        return (text if stop_found else text + self.stops.flush()), stop_found

    @property
    def _may_stop(self) -> bool:
        return self.num_tokens > self.min_tokens


class ClientAnswer:
    """The choices of one client's request under way: one run a prompt. Iterate `pieces` once, to its end or not; call
    `close` where that may not come to pass."""

    def __init__(
        self, tokenizer: Tokenizer, runs: Sequence[RequestRun], request: AnswerRequest, limits: AnswerLimits
    ) -> None:
        self._tokenizer = tokenizer
        self._runs = runs
        self._specs = request.specs
        self._stops, self._text = request.stops, request.text
        self._limits = limits
        self.shown = request.shown
        self.id = request.specs[0].request_id
        """Of the answer, and of its (first) request."""
        self.num_choices = sum(spec.sampling.n for spec in request.specs)
        """Over all prompts; so with `prompt_tokens`."""
        self.prompt_tokens = sum(len(spec.prompt_token_ids) for spec in request.specs)
        self.completion_tokens = 0
        """Over all choices: of the pieces given out so far, those that end a choice unseen included."""

    def __repr__(self) -> str:
        return (
            f"<ClientAnswer {self.id} prompts={len(self._specs)} choices={self.num_choices}"
            f" prompt_tokens={self.prompt_tokens} completion_tokens={self.completion_tokens}>"
        )

    def prompt_token_ids(self, index: int) -> list[int]:
        """The prompt of choice `index`."""
        return [spec.prompt_token_ids for spec in self._specs for _ in range(spec.sampling.n)][index]

    @property
    def cached_tokens(self) -> int:
        """Over all prompts; final once `pieces` has ended."""
        return sum(run.machine.cached_tokens for run in self._runs)

    def close(self) -> None:
        """Runs that have not begun never will."""
        for run in self._runs:
            run.drop()

    def pieces(self) -> AsyncGenerator[TextPiece]:
        """Text as it comes, choices interleaved. Closing it early cancels every leg. Raises what a run raises."""
        return self._pieces_of_run(0) if len(self._runs) == 1 else self._pieces_of_all()

    async def _pieces_of_all(self) -> AsyncGenerator[TextPiece]:
        # Several runs: a task each reads its run into one bounded queue. The queue has, per run, pieces and then
        # exactly one last item:
        #   1. a piece: it is yielded. Pieces of one run keep their order; those of different runs interleave.
        #   2. None: that run has ended well. The answer ends with the last of them.
        #   3. an error: that run has failed, and the answer with it; the other runs are cancelled.
        # The reader may also stop in the middle (the client has left): closing this generator raises GeneratorExit at
        # the `yield`. In each case `finally` cancels the tasks, which may be waiting for room in the queue, and waits
        # until they have left their runs, so that no leg outlives the answer.
        queue: asyncio.Queue[TextPiece | Exception | None] = asyncio.Queue(self._limits.max_queued_pieces)
        tasks = [asyncio.create_task(self._read_run(number, queue)) for number in range(len(self._runs))]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, TextPiece):
                    yield item
                else:
                    raise item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()  # a task that was cancelled before its first step has not entered its run

    async def _read_run(self, number: int, queue: "asyncio.Queue[TextPiece | Exception | None]") -> None:
        try:
            async with aclosing(self._pieces_of_run(number)) as pieces:
                async for piece in pieces:
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:  # handed to the reader of the queue, which raises it
            await queue.put(error)

    async def _pieces_of_run(self, number: int) -> AsyncGenerator[TextPiece]:
        run, spec = self._runs[number], self._specs[number]
        first = sum(before.sampling.n for before in self._specs[:number])
        choices = [
            _TextChoice(
                Detokenizer(self._tokenizer, spec.prompt_token_ids, self._text),
                StopChecker(self._stops, self._text.include_stop),
                spec.sampling.min_tokens,
            )
            for _ in range(spec.sampling.n)
        ]
        async with run:
            async for emit in run:
                choice = choices[emit.index]
                piece, stop_found = self._piece(first, choice, emit)
                if stop_found:
                    run.stop(emit.index, choice.num_tokens)
                if piece.text or piece.finish_reason or piece.logprobs or piece.token_ids:
                    yield piece

    def _piece(self, first: int, choice: _TextChoice, emit: Emit) -> tuple[TextPiece, bool]:
        """(what this output adds to its choice, whether a stop string was found in it)."""
        before = choice.num_tokens
        is_text = emit.stop_token_id is None or self._text.include_stop
        visible = emit.token_ids if is_text else emit.token_ids[:-1]
        text, stop_found = choice.read(visible)
        if emit.finish_reason is not None and not stop_found:
            rest, stop_found = choice.read_end()
            text += rest
        if not stop_found:
            choice.num_tokens = before + len(emit.token_ids)  # a stop token is counted though not read
        count = choice.num_tokens - before
        self.completion_tokens += count
        logprobs = list(zip(emit.token_ids[:count], emit.logprobs, strict=False)) if emit.logprobs else []
        reason = FinishReason.STOP if stop_found else emit.finish_reason
        ids = emit.token_ids[:count] if self.shown.token_ids else ()
        return TextPiece(first + emit.index, text, logprobs, reason.value if reason else None, ids), stop_found


def _num_chars(prompt: Prompt) -> int:
    """Of all texts in it: how much work it is to make tokens of it."""
    if isinstance(prompt, TokenPrompt):
        return 0
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    count = 0
    rest: list[object] = [prompt.messages, prompt.tools, prompt.documents, prompt.template_values]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, dict):  # as JSON's objects are; a test for any Mapping takes five times as long
            rest += [*value, *value.values()]
    return count


class Answerer:
    """Starts answers. One a router. A surface calls, in this order: `check_model`, `encode`, `start`."""

    def __init__(
        self,
        *,
        model: str,
        tokenizer: Tokenizer,
        dispatcher: Dispatcher,
        cluster: Cluster,
        run: "Runner[list[int]]",
        admission: Admission | None = None,
        limits: AnswerLimits = AnswerLimits(),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._dispatcher = dispatcher
        self._cluster = cluster
        self._run = run
        self._limits = limits
        self._admission = admission
        self._waiting_chars = 0

    def __repr__(self) -> str:
        return f"<Answerer of {self.model!r}>"

    @property
    def max_context(self) -> int | None:
        """Tokens that a prompt and its completion may have together; None: no engine has ever reported."""
        return self._cluster.max_context()

    def check_model(self, name: str) -> None:
        """Raises ModelNotFoundError."""
        if name != self.model:
            raise ModelNotFoundError(f"the model {name!r} does not exist here; there is {self.model!r}", param="model")

    async def encode(self, prompts: Sequence[Prompt], whose: str = "") -> list[list[int]]:
        """The tokens of each prompt. `whose`: what others have asked makes it no faster. Raises InvalidRequestError
        where the chat template refuses the messages, and OverloadedError."""
        num_chars, limits, tokens = sum(map(_num_chars, prompts)), self._limits, partial(self._tokens, whose=whose)
        if num_chars <= limits.inline_chars:
            return [tokens(prompt) for prompt in prompts]
        if self._waiting_chars and self._waiting_chars + num_chars > limits.max_waiting_chars:
            raise OverloadedError(f"texts of {self._waiting_chars} characters wait to be made tokens; come back later")
        self._waiting_chars += num_chars
        try:
            return [
                prompt.token_ids if isinstance(prompt, TokenPrompt) else await self._run(partial(tokens, prompt))
                for prompt in prompts
            ]
        finally:
            self._waiting_chars -= num_chars

    async def admit(self, request: AnswerRequest) -> ClientAnswer:
        """As `start`, when its turn has come. Raises RateLimitError too, where its first token would come too late."""
        if self._admission is None:  # whoever comes gets in
            return self.start(request)
        self._check(request)
        return await self._admission.admit(request, partial(self._open, request))

    def start(self, request: AnswerRequest) -> ClientAnswer:
        """Route the prompts; iterating the answer's pieces runs them.

        Raises NodeUnavailableError, InvalidRequestError, ContextLengthError, OverloadedError: of none is anything left.
        """
        self._check(request)
        return self._open(request)

    def _check(self, request: AnswerRequest) -> None:
        max_context = self.max_context
        if max_context is None:
            raise NodeUnavailableError(self._cluster.why_no_decoder())
        for spec in request.specs:
            self._check_fit(spec, max_context, request.names)
        if sum(spec.sampling.n for spec in request.specs) > self._limits.max_choices:
            text = f"{request.names.n} times the prompts must not be over {self._limits.max_choices}"
            raise InvalidRequestError(text, param=request.names.n)

    def _open(self, request: AnswerRequest, first: Decision | None = None, waited_s: float = 0.0) -> ClientAnswer:
        """`first`: the nodes of the first prompt, just chosen."""
        with ExitStack() as opened:
            runs: list[RequestRun] = []
            for number, spec in enumerate(request.specs):
                runs.append(self._dispatcher.open(spec, None if number else first, waited_s=waited_s))
                opened.callback(runs[-1].drop)
            opened.pop_all()
        return ClientAnswer(self.tokenizer, runs, request, self._limits)

    def _tokens(self, prompt: Prompt, whose: str) -> list[int]:
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        text = self.tokenizer.render_chat(prompt) if isinstance(prompt, ChatPrompt) else prompt.text
        return self.tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens, whose=whose)

    def _check_fit(self, spec: RequestSpec, max_context: int, names: FieldNames) -> None:
        prompt, sampling = spec.prompt_token_ids, spec.sampling
        if not prompt:
            raise InvalidRequestError(f"{names.prompt} has no tokens", param=names.prompt)
        if len(prompt) + sampling.max_tokens > max_context:
            raise ContextLengthError(
                f"{ContextLengthError.says(max_context)}. However, you requested {len(prompt) + sampling.max_tokens} "
                f"tokens ({len(prompt)} in the {names.prompt}, {sampling.max_tokens} for the completion)",
                param=names.prompt,
            )
        vocab_size = self._cluster.vocab_size()
        if vocab_size is None:
            return
        given = {
            names.prompt: prompt,
            names.stop_token_ids: sampling.stop_token_ids,
            names.logit_bias: sampling.logit_bias,
        }
        for name, ids in given.items():
            if (biggest := max(ids, default=0)) >= vocab_size:
                text = f"{name}: token id {biggest} is outside of the vocabulary of {vocab_size}"
                raise InvalidRequestError(text, param=name)
