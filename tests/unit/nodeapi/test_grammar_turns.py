"""Whose grammar is compiled next: who sends many, or slow ones, waits for them alone."""

import asyncio
from collections.abc import Callable
from functools import partial

import pytest
from llguidance import LLMatcher

from kvcore.clock import ManualClock
from kvcore.errors import OverloadedError
from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.grammars.limits import GrammarLimits
from nodeapi.grammars.matcher import GrammarMatcher
from nodeapi.grammars.turns import CompileTurns
from nodeapi.grammars.vocabulary import byte_vocabulary

EOS, VOCAB = 0, 300


def taken(turns: CompileTurns[str], seconds: Callable[[str], float] = lambda _: 1.0) -> list[str]:
    order = []
    while (found := turns.take()) is not None:
        owner, one = found
        order.append(one)
        turns.charge(owner, seconds(one))
    return order


def test_owners_take_turns_and_each_ones_own_keep_their_order() -> None:
    turns: CompileTurns[str] = CompileTurns()
    for owner, one in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")]:
        turns.add(owner, one)
    assert taken(turns) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_it_is_time_that_is_shared_not_turns() -> None:
    turns: CompileTurns[str] = CompileTurns()
    for owner in "ab":
        for number in range(3):
            turns.add(owner, f"{owner}{number}")
    order = taken(turns, lambda one: 5.0 if one.startswith("a") else 0.1)
    assert order == ["a0", "b0", "b1", "b2", "a1", "a2"]


def test_who_comes_anew_has_saved_up_nothing_and_owes_what_it_took() -> None:
    turns: CompileTurns[str] = CompileTurns()
    for number in range(3):
        turns.add("a", f"a{number}")
    assert turns.take() == ("a", "a0")
    turns.charge("a", 5.0)
    assert turns.take() == ("a", "a1")
    for number in range(3):
        turns.add("b", f"b{number}")
    turns.charge("a", 5.0)
    assert taken(turns, lambda _: 4.0) == ["b0", "b1", "a2", "b2"]
    turns.add("b", "b3")
    turns.add("c", "c0")
    assert taken(turns)[0] == "c0", "its last one took 4 s"


def test_what_several_wait_for_is_had_at_the_first_turn_of_any() -> None:
    turns: CompileTurns[str] = CompileTurns()
    for one in ("a1", "a2", "both"):
        turns.add("a", one)
    turns.add("b", "both")
    assert turns.longest() == ("a", 3) and turns.last_alone("a") == "a2" and turns.last_alone("b") is None
    turns.remove("a1")
    assert taken(turns) == ["a2", "both"] and not turns


class Compiling:
    """Grammars of which each compiles when it is let, in `seconds` of its own time. `order`: as they were begun."""

    def __init__(self, limits: GrammarLimits = GrammarLimits()) -> None:
        self.clock, self.order = ManualClock(), list[str]()
        self._free = asyncio.Semaphore(0)
        self.grammars = Grammars(
            partial(byte_vocabulary, VOCAB, EOS), [EOS], beside=self._beside, limits=limits, clock=self.clock
        )
        self.seconds = 1.0

    async def _beside(self, work: Callable[[], LLMatcher]) -> LLMatcher:
        grammar: Grammar = work.args[0]  # type: ignore[attr-defined]
        self.order.append(grammar.text)
        await self._free.acquire()
        self.clock.advance(self.seconds)
        return work()

    def asks(self, owner: str, text: str) -> "asyncio.Task[GrammarMatcher]":
        return asyncio.create_task(self.grammars.matcher(Grammar(kind=GrammarKind.REGEX, text=text), owner))

    async def until_begun(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.order) < count:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)

    def let(self, count: int) -> None:
        for _ in range(count):
            self._free.release()


async def test_one_that_floods_keeps_others_waiting_for_one_of_its_own_alone() -> None:
    compiling = Compiling()
    flood = [compiling.asks("flood", f"a{number}") for number in range(30)]
    await compiling.until_begun(1)
    others = [compiling.asks("other", text) for text in ("x", "y")]
    compiling.let(4)
    await asyncio.gather(*others)
    await compiling.until_begun(4)
    assert compiling.order[:4] == ["a0", "x", "a1", "y"] and not flood[2].done()
    compiling.let(40)
    await asyncio.gather(*flood)
    assert [text for text in compiling.order if text.startswith("a")] == [f"a{number}" for number in range(30)]


async def test_one_that_waits_in_a_flood_is_compiled_at_the_turn_of_another_who_wants_it() -> None:
    compiling = Compiling()
    flood = [compiling.asks("flood", f"a{number}") for number in range(10)]
    await compiling.until_begun(1)
    same = compiling.asks("other", "a9")
    compiling.let(2)
    await same
    compiling.let(20)
    await asyncio.gather(*flood)
    assert compiling.order[:2] == ["a0", "a9"] and len(compiling.order) == 10


async def test_a_flood_that_takes_every_place_makes_room_for_others() -> None:
    compiling = Compiling(GrammarLimits(max_waiting=4))
    flood = [compiling.asks("flood", f"a{number}") for number in range(4)]
    await compiling.until_begun(1)
    with pytest.raises(OverloadedError, match="4 grammars are being compiled"):
        await compiling.asks("flood", "a4")
    other = compiling.asks("other", "x")
    with pytest.raises(OverloadedError, match="4 grammars are being compiled"):
        await flood[3]
    second = compiling.asks("other", "y")
    with pytest.raises(OverloadedError):  # by now they have as many as each other, but for one
        await second
    compiling.let(10)
    await asyncio.gather(other, *flood[:3])
    assert compiling.order == ["a0", "x", "a1", "a2"]


async def test_what_waits_when_it_is_closed_is_never_compiled() -> None:
    compiling = Compiling()
    asked = [compiling.asks("a", text) for text in "xyz"]
    await compiling.until_begun(1)
    compiling.grammars.close()
    compiling.let(5)
    ended = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(ended[0], GrammarMatcher)
    assert all(isinstance(one, asyncio.CancelledError) for one in ended[1:]) and compiling.order == ["x"]
