"""From validated requests to pieces of text: prompts to tokens, runs of the dispatcher, detokenizing, stop strings.

Owns the join of several prompts' runs into one stream. Knows no HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kvcore.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError, NodeUnavailableError
from nodeapi.messages import FinishReason, SamplingParams, TokenLogprob
from router.api import openai_schema as schema
from router.api.openai_schema import AnyRequest, ChatRequest, CompletionRequest
from router.nodes.cluster import Cluster
from router.requests.dispatch import Dispatcher
from router.requests.events import Emit
from router.requests.leg_requests import RequestSpec
from router.requests.run import RequestRun
from router.text.detokenizer import Detokenizer, StopChecker
from router.text.tokenizer import Runner, Tokenizer, encode

MAX_QUEUED_PIECES = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice. `logprobs`: (token id, its logprob) of the tokens of this piece. `token_ids`: as the
    engine gave them, a final stop token included; empty unless the client asked for them."""

    index: int
    text: str
    logprobs: Sequence[tuple[int, TokenLogprob]] = ()
    finish_reason: str | None = None
    token_ids: Sequence[int] = ()


@dataclass(slots=True)
class _Choice:
    detokenizer: Detokenizer
    stops: StopChecker


class Answer:
    """The choices of one client's request under way: one run a prompt. Iterate `pieces` once, to its end or not."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        runs: Sequence[RequestRun],
        specs: Sequence[RequestSpec],
        stops: list[str],
        *,
        with_token_ids: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._runs = runs
        self._specs = specs
        self._stops = stops
        self.with_token_ids = with_token_ids
        """Whether the client asked for the tokens beside the text."""

    @property
    def id(self) -> str:
        """Of the answer, and of its (first) request."""
        return self._specs[0].request_id

    @property
    def num_choices(self) -> int:
        """Over all prompts."""
        return sum(spec.sampling.n for spec in self._specs)

    @property
    def prompt_tokens(self) -> int:
        """Over all prompts."""
        return sum(len(spec.prompt_token_ids) for spec in self._specs)

    def prompt_token_ids(self, index: int) -> list[int]:
        """The prompt of choice `index`."""
        return [spec.prompt_token_ids for spec in self._specs for _ in range(spec.sampling.n)][index]

    @property
    def cached_tokens(self) -> int:
        """Over all prompts; final once `pieces` has ended."""
        return sum(run.machine.cached_tokens for run in self._runs)

    @property
    def completion_tokens(self) -> int:
        """Over all choices; final once `pieces` has ended."""
        return sum(run.machine.completion_tokens for run in self._runs)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Text as it comes, choices interleaved. Closing it early cancels every leg. Raises what a run raises."""
        if len(self._runs) == 1:
            async with aclosing(self._of_run(0)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(MAX_QUEUED_PIECES)
        tasks = [asyncio.create_task(self._pump(number, queue)) for number in range(len(self._runs))]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, Piece):
                    yield item
                else:
                    raise item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, number: int, queue: "asyncio.Queue[Piece | BaseException | None]") -> None:
        try:
            async with aclosing(self._of_run(number)) as pieces:
                async for piece in pieces:
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:  # handed to the reader of the queue, which raises it
            await queue.put(error)

    async def _of_run(self, number: int) -> AsyncGenerator[Piece]:
        run, spec = self._runs[number], self._specs[number]
        first = sum(before.sampling.n for before in self._specs[:number])
        choices = [
            _Choice(Detokenizer(self._tokenizer, spec.prompt_token_ids), StopChecker(self._stops))
            for _ in range(spec.sampling.n)
        ]
        async with run:
            async for emit in run:
                piece, hit = self._piece(first, choices[emit.index], emit)
                if hit:
                    run.stop(emit.index)
                if piece.text or piece.finish_reason or piece.logprobs or piece.token_ids:
                    yield piece

    def _piece(self, first: int, choice: _Choice, emit: Emit) -> tuple[Piece, bool]:
        shown = emit.token_ids if emit.stop_token_id is None else emit.token_ids[:-1]
        logprobs = list(zip(shown, emit.logprobs, strict=False)) if emit.logprobs else []
        text, hit = choice.stops.feed(choice.detokenizer.feed(shown))
        if emit.finish_reason is not None and not hit:
            more, hit = choice.stops.feed(choice.detokenizer.flush())
            text += more if hit else more + choice.stops.flush()
        reason = FinishReason.STOP if hit else emit.finish_reason
        ids = emit.token_ids if self.with_token_ids else ()
        return Piece(first + emit.index, text, logprobs, reason.value if reason else None, ids), hit


class Answerer:
    """Starts answers. One a router."""

    def __init__(
        self, *, model: str, tokenizer: Tokenizer, dispatcher: Dispatcher, cluster: Cluster, run: "Runner[list[int]]"
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._dispatcher = dispatcher
        self._cluster = cluster
        self._run = run

    async def chat(self, request: ChatRequest, request_id: str, client_request_id: str) -> Answer:
        """Raises InvalidRequestError and its kin, OverloadedError, NodeUnavailableError."""
        self._check_model(request.model)
        text = self.tokenizer.render_chat(schema.messages_of(request))
        ids = await encode(self.tokenizer, text, add_special_tokens=False, run=self._run)
        return self._answer(request, [ids], request_id, client_request_id, "messages")

    async def complete(self, request: CompletionRequest, request_id: str, client_request_id: str) -> Answer:
        """As `chat`."""
        self._check_model(request.model)
        given = schema.prompts_of(request)
        chars = sum(len(prompt) for prompt in given if isinstance(prompt, str))
        prompts: list[list[int]] = []
        for prompt in given:
            if isinstance(prompt, str):
                ids = await encode(self.tokenizer, prompt, add_special_tokens=True, run=self._run, chars=chars)
                prompts.append(ids)
            else:
                prompts.append(prompt)
        return self._answer(request, prompts, request_id, client_request_id, "prompt")

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise ModelNotFoundError(f"the model {name!r} does not exist here; there is {self.model!r}", param="model")

    def _answer(
        self, request: AnyRequest, prompts: list[list[int]], request_id: str, client_request_id: str, param: str
    ) -> Answer:
        stops = schema.stops_of(request)
        max_context = self._cluster.max_context()
        if max_context is None:
            # The checks that need no node come first: a wrong request is wrong at any time.
            schema.sampling_of(request, 0, 1 << 31)
            raise NodeUnavailableError(self._cluster.why_no_decoder())
        specs: list[RequestSpec] = []
        for number, prompt in enumerate(prompts):
            sampling = schema.sampling_of(request, len(prompt), max_context)
            self._check_fit(prompt, sampling, max_context, param)
            specs.append(
                RequestSpec(
                    request_id=request_id if number == 0 else f"{request_id}-{number}",
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    cache_salt=(request.cache_salt or "").encode(),
                    client_request_id=client_request_id,
                )
            )
        if sum(spec.sampling.n for spec in specs) > schema.MAX_N:
            raise InvalidRequestError(f"n times the prompts must not be over {schema.MAX_N}", param="n")
        runs = [self._dispatcher.open(spec, beside=number) for number, spec in enumerate(specs)]
        return Answer(self.tokenizer, runs, specs, stops, with_token_ids=bool(request.return_token_ids))

    def _check_fit(self, prompt: list[int], sampling: SamplingParams, max_context: int, param: str) -> None:
        if not prompt:
            raise InvalidRequestError(f"{param} has no tokens", param=param)
        if len(prompt) + sampling.max_tokens > max_context:
            raise ContextLengthError(
                f"this model's context is {max_context} tokens, but {len(prompt) + sampling.max_tokens} were requested "
                f"({len(prompt)} in the {param}, {sampling.max_tokens} for the completion)",
                param=param,
            )
        vocab_size = self._cluster.vocab_size()
        if vocab_size is None:
            return
        given = {param: prompt, "stop_token_ids": sampling.stop_token_ids, "logit_bias": sampling.logit_bias}
        for name, ids in given.items():
            if (biggest := max(ids, default=0)) >= vocab_size:
                text = f"{name}: token id {biggest} is outside of the vocabulary of {vocab_size}"
                raise InvalidRequestError(text, param=name)
