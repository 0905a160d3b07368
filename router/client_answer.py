"""One client's answer under way: its runs, detokenized and searched for stop strings, as pieces of text.

Owns the join of several prompts' runs into one stream. Knows no HTTP and no surface's field names.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import msgspec

from kvcore.errors import InvalidRequestError
from nodeapi.messages import FinishReason, TokenLogprob
from nodeapi.prompt_logprobs import PromptLogprobs
from router.parsing.dialects import AnswerParser
from router.parsing.forced import ForcedParser
from router.parsing.one_call import SecondCall
from router.parsing.reasoning_tokens import ReasoningTokens
from router.requests.events import Emit
from router.requests.run import RequestRun
from router.requests.spec import AnswerReading, AnswerRequest, RequestSpec
from router.text.detokenizer import Detokenizer, StopChecker
from router.text.repetition import RepetitionWatch
from router.text.tokenizer import Tokenizer
from router.text_choice import TextChoice

_PROMPT_END_TOKENS = 32
"""Of the prompt, in which the template may have opened the reasoning."""


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """Bounds of one answer."""

    inline_words: int = 16
    """Of `bad_words`; so it is with longer lists."""
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
    stop_reason: str | int | None = None
    """With `finish_reason` `stop`: the client's stop string, or stop token, that ended it; None: the model did."""
    scores: PromptLogprobs | None = None
    """Of the next tokens of the prompt of this choice, and of its other choices. Such a piece has nothing else."""


class PieceBundle:
    """Of one choice: pieces that wait until they have `interval` tokens together. The first and the last do not."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._held: list[TextPiece] = []
        self._tokens = 0
        self._begun = False

    def add(self, piece: TextPiece, num_tokens: int) -> TextPiece | None:
        """One more, of so many tokens. Returns all that waited, as one, when it is time."""
        self._held.append(piece)
        self._tokens += num_tokens
        if self._begun and self._tokens < self._interval and piece.finish_reason is None:
            return None
        held, self._held, self._tokens, self._begun = self._held, [], 0, True
        return msgspec.structs.replace(
            piece,
            text="".join(each.text for each in held),
            logprobs=[logprob for each in held for logprob in each.logprobs],
            token_ids=[token_id for each in held for token_id in each.token_ids],
        )


class PieceSink(Protocol):
    """A reader that can take pieces at once, without being woken for each."""

    @property
    def takes(self) -> bool:
        """Whether it takes one now. If not, that one and those behind it are given."""
        ...

    def put(self, piece: TextPiece) -> None:
        """One it takes."""
        ...

    async def give(self, piece: TextPiece) -> None:
        """Any one, in their order. May wait."""
        ...


class ClientAnswer:
    """The choices of one client's request under way: one run a prompt. Iterate `pieces` once, to its end or not, or
    `give_to` somebody; call `close` where that may not come to pass."""

    def __init__(
        self, tokenizer: Tokenizer, runs: Sequence[RequestRun], request: AnswerRequest, limits: AnswerLimits
    ) -> None:
        self._tokenizer = tokenizer
        self._runs = runs
        self._specs = request.specs
        self._stops, self._text, self._repetition = request.stops, request.text, request.repetition
        self._limits = limits
        self.shown, self.reading = request.shown, request.reading
        self._names = request.names
        self.id = request.client_id or request.specs[0].request_id
        """Of the answer: the client's, or its (first) request's."""
        self.sampling = request.specs[0].sampling
        """Of the (first) prompt: all but the room for tokens is the same of every other, `n` too."""
        self.num_choices = self.sampling.n * len(request.specs)
        """Over all prompts; so with `prompt_tokens`."""
        self.prompt_tokens = sum([len(spec.prompt_token_ids) for spec in request.specs])
        self.completion_tokens = 0
        """Over all choices: of the pieces given out so far, those that end a choice unseen included."""
        self._names_documents = bool([spec for spec in request.specs if spec.documents is not None])
        self._reasoning: list[ReasoningTokens] = []

    def __repr__(self) -> str:
        return (
            f"<ClientAnswer {self.id} prompts={len(self._specs)} choices={self.num_choices}"
            f" prompt_tokens={self.prompt_tokens} completion_tokens={self.completion_tokens}>"
        )

    def prompt_token_ids(self, index: int) -> list[int]:
        """The prompt of choice `index`."""
        return self._specs[self.prompt_of(index)].prompt_token_ids

    def parser(self, index: int, reading: AnswerReading) -> AnswerParser | ForcedParser:
        """What tells choice `index` apart, from its first character on."""
        return reading.parser(self._prompt_end(index))

    def _prompt_end(self, index: int) -> str:
        end = self.prompt_token_ids(index)[-_PROMPT_END_TOKENS:]
        return self._tokenizer.decode(end, skip_special_tokens=False)

    def choices_of(self, prompt: int) -> range:
        """The choices of the prompt at this place."""
        return range(prompt * self.sampling.n, (prompt + 1) * self.sampling.n)

    def prompt_of(self, choice: int) -> int:
        """The place of this choice's prompt."""
        return choice // self.sampling.n

    @property
    def prompts(self) -> list[list[int]]:
        """Their tokens."""
        return [spec.prompt_token_ids for spec in self._specs]

    @property
    def cached_tokens(self) -> int:
        """Over all prompts; final once `pieces` has ended."""
        return sum([run.machine.cached_tokens for run in self._runs])

    @property
    def reasoning_tokens(self) -> int | None:
        """So of `completion_tokens`; final once `pieces` has ended. None: the model writes no reasoning, or it is not
        told apart."""
        return sum(each.count for each in self._reasoning) if self.reading and self.reading.thinks else None

    @property
    def approximate_tokens(self) -> int | None:
        """Over all prompts, as far as it is known, which it is with the first piece of each. None: none names
        documents."""
        if not self._names_documents:
            return None
        return sum(run.approximate_tokens for run in self._runs)

    @property
    def may_be_approximate(self) -> bool:
        """So with the prompts of which nothing is known yet."""
        return any(run.may_be_approximate for run in self._runs)

    def close(self) -> None:
        """Runs that have not begun never will."""
        for run in self._runs:
            run.drop()

    async def give_to(self, sink: PieceSink) -> None:
        """Text as it comes, choices interleaved. Cancelling it cancels every leg. Raises what a run raises, and what
        `sink` does."""
        if len(self._runs) > 1:
            async with aclosing(self._pieces_of_all()) as pieces:
                async for one in pieces:
                    await sink.give(one)
            return
        async with self._runs[0] as run:
            read = self._reader(0)

            def take(emit: Emit) -> bool:
                if not sink.takes:
                    return False
                if (piece := read(emit)) is not None:
                    sink.put(piece)
                return True

            run.outputs.take = take
            try:
                async for emit in run:
                    if (piece := read(emit)) is not None:
                        await sink.give(piece)
            except InvalidRequestError as error:
                raise self._of_form(error, self._specs[0]) from error

    def pieces(self) -> AsyncGenerator[TextPiece]:
        """The same, to be iterated. Closing it early cancels every leg."""
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
        async with self._runs[number] as run:
            read = self._reader(number)
            try:
                async for emit in run:
                    if (piece := read(emit)) is not None:
                        yield piece
            except InvalidRequestError as error:
                raise self._of_form(error, self._specs[number]) from error

    def _reader(self, number: int) -> Callable[[Emit], TextPiece | None]:
        """What makes pieces of one run's outputs."""
        run, spec, repetition, reading = self._runs[number], self._specs[number], self._repetition, self.reading
        first = self.choices_of(number)[0]
        choices = [
            TextChoice(
                Detokenizer(self._tokenizer, spec.prompt_token_ids, self._text),
                StopChecker(self._stops, self._text.include_stop),
                spec.sampling.min_tokens,
                spec.sampling.stop_token_ids,
                RepetitionWatch(repetition, spec.sampling.min_tokens) if repetition is not None else None,
                SecondCall(self.parser(first, reading)) if reading is not None and reading.one_call else None,
                reading.counting(self._prompt_end(first)) if reading is not None else None,
            )
            for _ in range(spec.sampling.n)
        ]
        self._reasoning += [choice.reasoning for choice in choices if choice.reasoning is not None]
        bundles = [PieceBundle(interval) for _ in choices] if (interval := self.shown.stream_interval) > 1 else None

        def read(emit: Emit) -> TextPiece | None:
            if emit.prompt_logprobs is not None:
                return TextPiece(first, "", scores=emit.prompt_logprobs)
            choice = choices[emit.index]
            before = choice.num_tokens
            piece, cut = self._piece(first, choice, emit)
            if cut:
                run.stop(emit.index, choice.num_tokens)
            if bundles is not None:
                return bundles[emit.index].add(piece, choice.num_tokens - before)
            return piece if piece.text or piece.finish_reason or piece.logprobs or piece.token_ids else None

        return read

    def _of_form(self, error: InvalidRequestError, spec: RequestSpec) -> InvalidRequestError:
        """A node's refusal of a request with a form. Where it names no field it is of the form: all else has been
        checked here, and what its engine's library takes it alone knows."""
        if spec.sampling.grammar is None or error.param is not None or type(error) is not InvalidRequestError:
            return error
        name = self._names.of("grammar")
        return InvalidRequestError(f"{name}: {error.message}", param=name)

    def _piece(self, first: int, choice: TextChoice, emit: Emit) -> tuple[TextPiece, bool]:
        """(what this output adds to its choice, whether the router ends that: it has a stop string, repeats itself or
        calls too much). Where the engine has ended it with the same token, that is what is said."""
        before, count = choice.num_tokens, len(emit.token_ids)
        is_text = emit.stop_token_id is None or self._text.include_stop
        text, stop_found = choice.read(emit.token_ids if is_text else emit.token_ids[:-1])
        over = choice.over
        if emit.finish_reason is None and not (stop_found or over):
            choice.num_tokens = before + count
            return self._piece_of(first, emit, text, count), False
        if emit.finish_reason is not None and choice.num_tokens - before == count:
            over = ""
        if not stop_found:
            text += choice.stops.flush()  # a character that is not whole is no text, as with vLLM
        if not (stop_found or over):
            choice.num_tokens = before + count  # a stop token is counted though not read
        reason = FinishReason.STOP.value if stop_found else emit.finish_reason.value if emit.finish_reason else None
        said = choice.stops.found if stop_found else emit.stop_token_id
        if not stop_found and said not in choice.stop_token_ids:
            said = None
        if over and not stop_found:
            reason, said = over, "repetition_detected" if over == "repetition" else None  # as vLLM says it
        if reason is not None and choice.reasoning is not None:
            choice.reasoning.end()
        return self._piece_of(first, emit, text, choice.num_tokens - before, (reason, said)), stop_found or bool(over)

    def _piece_of(
        self, first: int, emit: Emit, text: str, count: int, end: tuple[str | None, str | int | None] = (None, None)
    ) -> TextPiece:
        """Of `count` tokens of this output. They are counted."""
        self.completion_tokens += count
        logprobs = list(zip(emit.token_ids[:count], emit.logprobs, strict=False)) if emit.logprobs else []
        if self.shown.scoring.prompt_alone:
            text, logprobs = "", []
        ids = emit.token_ids[:count] if self.shown.token_ids else ()
        return TextPiece(first + emit.index, text, logprobs, end[0], ids, end[1])
