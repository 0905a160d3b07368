"""Where a grammar begins in answers of models that reason first: the marks around the reasoning, as tokens. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from nodeapi.grammars.grammar import Grammar, stands_before
from router.parsing.dialects import Dialect
from router.text.tokenizer import Tokenizer

_BLANKS = (" ", "\n", "\n\n", "\n\n\n", "\t")


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """`opening`: the tokens that begin the reasoning; empty: every answer begins with it. `closing`: sequences of
    tokens of which each ends it. `blanks`: tokens of white space, which templates write behind marks."""

    closing: tuple[tuple[int, ...], ...]
    opening: tuple[int, ...] = ()
    blanks: frozenset[int] = field(default_factory=frozenset)

    def place(self, grammar: Grammar, prompt: Sequence[int], *, continues: bool) -> Grammar:
        """`grammar`, told what may come before it in an answer to `prompt`. `continues`: to go on with its last
        message."""
        end = len(prompt)
        while end and prompt[end - 1] in self.blanks:
            end -= 1
        if continues and self.opening:
            closed = max(_last(prompt, marks) for marks in self.closing)
            opened = _last(prompt, self.opening)
            return msgspec.structs.replace(grammar, after=self.closing) if opened > closed else grammar
        if stands_before(prompt, end, self.closing):
            return grammar
        if not self.opening or stands_before(prompt, end, [self.opening]):
            return msgspec.structs.replace(grammar, after=self.closing)
        return msgspec.structs.replace(grammar, after=self.closing, opening=self.opening)


def reasoning_marks(dialect: Dialect | None, tokenizer: Tokenizer) -> ReasoningMarks | None:
    """Of a model that speaks `dialect`, if its chat template knows any. None: its answers are all answer."""
    if dialect is None:
        return None

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    blanks = frozenset(one[0] for text in _BLANKS if len(one := ids(text)) == 1)
    if dialect.answers:
        return ReasoningMarks(tuple(map(ids, dialect.answers)), blanks=blanks)
    known = [marks for marks in dialect.thinks if marks[1] in tokenizer.chat_source]
    if not known:
        return None
    return ReasoningMarks(tuple(ids(closed.rstrip()) for _, closed in known), ids(known[0][0].rstrip()), blanks)


def _last(prompt: Sequence[int], marks: tuple[int, ...]) -> int:
    """Where `marks` stand last; -1: nowhere."""
    places: Iterator[int] = (start for start in range(len(prompt) - len(marks), -1, -1) if prompt[start] == marks[0])
    return next((start for start in places if tuple(prompt[start : start + len(marks)]) == marks), -1)
