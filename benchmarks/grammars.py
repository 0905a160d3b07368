"""What a grammar costs: compiling JSON schemas of several sizes, and one mask. `python -m benchmarks.grammars FOLDER`.

FOLDER: of a model, for its tokenizer.json. With xgrammar (and torch and transformers) installed it is measured beside
llguidance, by turns.
"""

import argparse
import asyncio
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llguidance import LLMatcher

from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.grammars.vocabulary import folder_vocabulary

_KINDS: list[tuple[dict[str, Any], object]] = [
    ({"type": "string"}, "Hello, this is a text of some words"),
    ({"type": "integer", "minimum": 0, "maximum": 1000}, 417),
    ({"enum": ["a", "b", "a longer value"]}, "a"),
    ({"type": "array", "items": {"type": "number"}, "maxItems": 5}, [1.5, 2.25, -3]),
    ({"type": "string", "pattern": "^[a-z]{2,8}$"}, "abcde"),
    ({"type": "boolean"}, True),
]


def nested(count: int, depth: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a schema with `count` properties, every sixth of them such an object again, an answer that fits)."""
    properties, answer = {}, {}
    for number in range(count):
        pair = _KINDS[number % 6]
        if depth > 1 and number % 6 == 0:
            pair = nested(max(2, count // 3), depth - 1)
        properties[f"field_{number}"], answer[f"field_{number}"] = pair
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return schema, answer


def cases() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for count, depth in ((3, 1), (18, 2), (90, 3)):
        yield f"{count} properties, {depth} deep", *nested(count, depth)
    optional = {"type": "object", "properties": {f"f{n}": {"type": "string"} for n in range(60)}}
    yield "60 optional properties", optional, {f"f{n}": "a text" for n in range(60)}
    long = {"type": "object", "properties": {"s": {"type": "string", "maxLength": 2000}}, "required": ["s"]}
    yield "a text of at most 2000 characters", long, {"s": "a text of some words"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grammars", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    vocabulary = folder_vocabulary(folder, _vocab_size(folder), ())
    peer = _xgrammar(folder, vocabulary.vocab_size)
    for name, schema, answer in cases():
        tokens = vocabulary.tokenize_str(json.dumps(answer))
        print(f"{name}: {len(json.dumps(schema))} bytes, {len(tokens)} tokens")
        print("  llguidance", _line(*_own(vocabulary, schema, tokens)))
        if peer is not None:
            print("  xgrammar  ", _line(*peer(schema, tokens)))


def _vocab_size(folder: Path) -> int:
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert isinstance(size, int)
    return size


def _own(vocabulary: Any, schema: dict[str, Any], tokens: list[int]) -> tuple[float, list[float]]:
    async def at_once(work: Callable[[], LLMatcher]) -> LLMatcher:
        return work()

    async def matcher() -> Any:
        grammars = Grammars(lambda: vocabulary, (), beside=at_once)
        return await grammars.matcher(Grammar(kind=GrammarKind.JSON, text=json.dumps(schema)))

    started = time.perf_counter()
    made = asyncio.run(matcher())
    compiled_s = time.perf_counter() - started
    return compiled_s, [_timed(partial(made.mask, tokens[:end], ())) for end in range(len(tokens))]


def _xgrammar(folder: Path, vocab_size: int) -> Callable[[dict[str, Any], list[int]], tuple[float, list[float]]] | None:
    try:
        xgrammar, transformers = map(importlib.import_module, ("xgrammar", "transformers"))
    except ImportError:
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def measure(schema: dict[str, Any], tokens: list[int]) -> tuple[float, list[float]]:
        started = time.perf_counter()
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
        compiled_s, masks = time.perf_counter() - started, []
        bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        for token in tokens:
            masks.append(_timed(partial(matcher.fill_next_token_bitmask, bitmask)))
            if not matcher.accept_token(token):
                break
        return compiled_s, masks

    return measure


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _line(compiled_s: float, masks: list[float]) -> str:
    mean, longest = statistics.mean(masks) * 1e6, max(masks) * 1e3
    return f"compiled in {compiled_s * 1e3:.1f} ms, a mask in {mean:.0f} us, at most {longest:.1f} ms"


if __name__ == "__main__":
    main()
