"""Grammars compiled: beside the loop, within bounds, and once each.

Owns the vocabulary, which is read when the first grammar comes, and the compiled ones. Invariant: a text that a client
sent holds one thread, for as long as its fuel lasts; whoever waits for it waits no longer than `compile_s`, and not
behind all that another has sent.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from kvcore.clock import Clock, SystemClock
from kvcore.errors import InvalidRequestError, OverloadedError
from nodeapi.grammars.grammar import Grammar
from nodeapi.grammars.limits import GrammarLimits
from nodeapi.grammars.matcher import GrammarMatcher
from nodeapi.grammars.source import source_of
from nodeapi.grammars.turns import CompileTurns

_T = TypeVar("_T")
Beside = Callable[[Callable[[], _T]], Awaitable[_T]]
"""Runs blocking work beside the loop."""
_Key = tuple[object, ...]


@dataclass(slots=True, eq=False)
class _Compiling:
    """One grammar that is compiled, or waits for it. `made`: what comes of it."""

    key: _Key
    grammar: Grammar
    made: "asyncio.Future[LLMatcher]"
    has_begun: bool = False
    waiting: int = 0
    """Who want it."""


class Grammars:
    """For one vocabulary. Close it in the end. `read`: reads the vocabulary, blocking. `beside`: where work is run;
    None: on threads of its own. `clock`: the system's, unless a simulation has its own."""

    def __init__(
        self,
        read: Callable[[], LLTokenizer],
        eos_token_ids: Sequence[int],
        *,
        limits: GrammarLimits = GrammarLimits(),
        beside: Beside[LLMatcher] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._read = read
        self._eos = tuple(eos_token_ids)
        self._limits = limits
        self._beside = beside
        self._threads: ThreadPoolExecutor | None = None
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[_Key, LLMatcher] = OrderedDict()
        self._running: dict[_Key, _Compiling] = {}
        self._turns: CompileTurns[_Compiling] = CompileTurns()
        self._active = 0
        """How many are being compiled; the others that run wait for their turn."""
        self._clock = clock or SystemClock()

    def __repr__(self) -> str:
        return f"<Grammars {len(self._kept)} compiled, {len(self._running)} being compiled>"

    async def matcher(self, grammar: Grammar, owner: Hashable = "") -> GrammarMatcher:
        """At the beginning of `grammar`. `owner`: whose it is, for the turns. Raises InvalidRequestError with what is
        wrong with it, or that it takes too long; OverloadedError while too many others are compiled; ModelLoadError
        where the vocabulary cannot be read."""
        key = (grammar.kind, grammar.text, grammar.whitespace)
        compiled = self._kept.get(key)
        if compiled is None:
            compiled = await self._compiled(key, grammar, owner)
        self._kept.move_to_end(key)
        assert self._vocabulary is not None
        return GrammarMatcher(grammar, compiled, self._eos, self._vocabulary.vocab_size)

    def close(self) -> None:
        """What waits is never compiled; what is being compiled is not waited for."""
        while (taken := self._turns.take()) is not None:
            taken[1].made.cancel()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _compiled(self, key: _Key, grammar: Grammar, owner: Hashable) -> LLMatcher:
        limits, running = self._limits, self._running.get(key)
        if running is None:
            self._make_room(owner)
            made = asyncio.get_running_loop().create_future()
            running = self._running[key] = _Compiling(key, grammar, made)
        if not running.has_begun:
            self._turns.add(owner, running)
            self._begin()
        running.waiting += 1
        try:
            async with asyncio.timeout(limits.compile_s):
                return await asyncio.shield(running.made)
        except TimeoutError as error:
            if not running.has_begun:
                raise OverloadedError("other grammars are being compiled; come back later") from error
            raise InvalidRequestError(f"it was not compiled within {limits.compile_s:g} s") from error
        finally:
            running.waiting -= 1
            if not running.waiting and not running.has_begun:
                self._leave(running)  # now: who comes from here on must not end with it
                running.made.cancel()

    def _make_room(self, owner: Hashable) -> None:
        """Where too many wait, the last of who has the most gives way to who has fewer."""
        if len(self._running) < self._limits.max_waiting:
            return
        error = OverloadedError(f"{len(self._running)} grammars are being compiled; come back later")
        most, count = self._turns.longest() if self._turns else (owner, 0)
        last = self._turns.last_alone(most) if count > self._turns.count(owner) + 1 else None
        if last is None:
            raise error
        self._leave(last)
        _settle(last.made, error)

    def _begin(self) -> None:
        """What has its turn, as long as a thread is free."""
        while self._active < self._limits.threads and (taken := self._turns.take()) is not None:
            owner, running = taken
            running.has_begun = True
            self._active += 1
            work = asyncio.ensure_future(self._run(partial(self._compile, running.grammar)))
            work.add_done_callback(partial(self._ended, owner, running, self._clock.now()))

    async def _run(self, work: Callable[[], LLMatcher]) -> LLMatcher:
        if self._beside is not None:
            return await self._beside(work)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._limits.threads, thread_name_prefix="grammars")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _leave(self, running: _Compiling) -> None:
        self._turns.remove(running)
        if self._running.get(running.key) is running:
            del self._running[running.key]

    def _ended(self, owner: Hashable, running: _Compiling, begun: float, work: "asyncio.Future[LLMatcher]") -> None:
        self._active -= 1
        self._turns.charge(owner, self._clock.now() - begun)
        self._leave(running)
        if work.cancelled():
            running.made.cancel()
        elif (error := work.exception()) is not None:
            _settle(running.made, error)
        else:
            self._kept[running.key] = work.result()
            while len(self._kept) > self._limits.max_kept:
                self._kept.popitem(last=False)
            running.made.set_result(work.result())
        self._begin()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = self._read()
        limits = self._limits
        bounds = LLParserLimits(
            max_items_in_row=limits.row_items,
            initial_lexer_fuel=limits.parser_fuel,
            step_lexer_fuel=limits.step_fuel,
            step_max_items=limits.step_items,
            max_lexer_states=limits.lexer_states,
            max_grammar_size=limits.grammar_symbols,
            verbose_errors=False,
        )
        source = source_of(grammar, self._vocabulary, limits)
        compiled = LLMatcher(self._vocabulary, source, log_level=0, limits=bounds)
        probe = compiled.deep_copy()  # of a grammar that cannot begin only its first mask says so
        probe.compute_bitmask()
        if error := compiled.get_error() or probe.get_error():
            raise InvalidRequestError(_first_lines(error))
        return compiled


def _settle(made: "asyncio.Future[LLMatcher]", error: BaseException) -> None:
    """Whoever waits gets the error; that nobody does is no fault."""
    made.set_exception(error)
    made.exception()


def _first_lines(error: str) -> str:
    """What llguidance says, without the state that it dumps."""
    text = " ".join(error.partition("<state>")[0].replace("<non-verbose/>", "").split())[:400]
    return "no text can follow it" if text == "NoExtensionBias" else text
