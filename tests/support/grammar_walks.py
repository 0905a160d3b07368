"""Answers drawn inside a grammar, byte by byte, by the masks that engines use."""

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from llguidance import LLMatcher

from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar
from nodeapi.grammars.matcher import GrammarMatcher
from nodeapi.grammars.vocabulary import byte_vocabulary

EOS, VOCAB = 0, 257
_MANY = 40
"""Tokens: where so many may come, text is free."""
_PATIENCE = 150
"""Tokens, after which an answer is led to its end."""
_CLOSING = ('"', "]", "}")


async def _at_once(work: Callable[[], LLMatcher]) -> LLMatcher:
    return work()


def matcher_of(grammar: Grammar) -> GrammarMatcher:
    """At its beginning, over bytes. Raises InvalidRequestError."""
    grammars = Grammars(partial(byte_vocabulary, VOCAB, EOS), [EOS], beside=_at_once)
    return asyncio.run(grammars.matcher(grammar))


def lets(grammar: Grammar, text: str) -> str:
    """`whole`: this is an answer; `begun`: a beginning of one; else what is let through of it."""
    matcher, output = matcher_of(grammar), list[int]()
    for token in text.encode():
        mask = matcher.mask(output, [EOS])
        if mask is None or not mask[token]:
            return bytes(output).decode(errors="replace")
        output.append(token)
    mask = matcher.mask(output, [EOS])
    return "whole" if mask is not None and mask[EOS] else "begun"


def drawn_answer(grammar: Grammar, draw: random.Random, endings: Sequence[str]) -> str:
    """A whole answer. `endings`: texts that end what is free in it, which chance alone would hardly write."""
    matcher, output = matcher_of(grammar), list[int]()
    texts = [text.encode() for text in (*_CLOSING, *endings) if text]
    while True:
        mask = matcher.mask(output, [EOS])
        assert mask is not None, (bytes(output[-200:]), matcher)
        may = [int(token) for token in np.flatnonzero(mask)]
        is_late = len(output) > _PATIENCE
        if EOS in may and (len(may) == 1 or is_late or draw.random() < 0.3):
            return bytes(output).decode()
        assert len(output) < 8 * _PATIENCE, bytes(output[-200:])
        if is_late or (len(may) > _MANY and draw.random() < 0.4):
            whole = (
                text
                for text in (draw.sample(texts, len(texts)) if is_late else [draw.choice(texts)])
                if _lets_next(matcher, output, text)
            )
            if (text := next(whole, None)) is not None:
                output += text
                continue
        printable = [token for token in may if 32 <= token < 127 or token == 10] or may
        output.append(draw.choice([token for token in printable if token != EOS] or may))


def _lets_next(matcher: GrammarMatcher, output: Sequence[int], text: bytes) -> bool:
    ahead = matcher.fork()
    masks = ((ahead.mask([*output, *text[:at]], [EOS]), token) for at, token in enumerate(text))
    return all(mask is not None and mask[token] for mask, token in masks)
