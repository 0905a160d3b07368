"""Grammars compiled: what each kind lets through, what is refused, and that none costs more than its bounds."""

import asyncio
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from support.small_tokenizers import byte_level, saved

from kvcore.errors import InvalidRequestError, ModelLoadError, OverloadedError
from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.grammars.limits import GrammarLimits
from nodeapi.grammars.matcher import GrammarMatcher
from nodeapi.grammars.vocabulary import byte_vocabulary, folder_vocabulary

EOS, VOCAB = 0, 300
INTEGER = {"type": "integer"}


async def at_once(work: Callable[[], LLMatcher]) -> LLMatcher:
    return work()


def grammars(limits: GrammarLimits = GrammarLimits()) -> Grammars:
    return Grammars(partial(byte_vocabulary, VOCAB, EOS), [EOS], beside=at_once, limits=limits)


def matcher_of(kind: GrammarKind, text: object, **fields: object) -> GrammarMatcher:
    whole = text if isinstance(text, str) else json.dumps(text)
    return asyncio.run(grammars().matcher(Grammar(kind=kind, text=whole, **fields)))  # type: ignore[arg-type]


def follows(matcher: GrammarMatcher, text: str) -> bool:
    """Whether `text` may be a whole answer."""
    output: list[int] = []
    for token in text.encode():
        mask = matcher.mask(output, [EOS])
        if mask is None or not mask[token]:
            return False
        output.append(token)
    mask = matcher.mask(output, [EOS])
    return mask is not None and bool(mask[EOS])


def tag(form: dict[str, object]) -> dict[str, object]:
    return {"type": "structural_tag", "format": form}


CALL = {"begin": "<f=a>", "content": {"type": "json_schema", "json_schema": INTEGER}, "end": "</f>"}
CASES: list[tuple[GrammarKind, object, list[str], list[str]]] = [
    (GrammarKind.JSON, INTEGER, ["7", "-12"], ["x", "", "7.5"]),
    (GrammarKind.JSON, {"enum": ["a", 3]}, ['"a"', "3"], ["a", "4"]),
    (GrammarKind.REGEX, "[ab]{2}", ["ab"], ["a", "abc"]),
    (GrammarKind.CHOICE, ["one", 'sa"y', "é"], ["one", 'sa"y', "é"], ["two", "on"]),
    (GrammarKind.GRAMMAR, 'start: "a" B\nB: /[0-9]+/', ["a12"], ["a", "12"]),
    (GrammarKind.GRAMMAR, 'root ::= "yes" | "no"', ["yes", "no"], ["maybe"]),
    (GrammarKind.STRUCTURAL_TAG, tag({"type": "const_string", "value": "x/y"}), ["x/y"], ["x", ""]),
    (GrammarKind.STRUCTURAL_TAG, tag({"type": "regex", "pattern": "a/[0-9]"}), ["a/7"], ["a7"]),
    (GrammarKind.STRUCTURAL_TAG, tag({"type": "grammar", "grammar": 'root ::= "q"'}), ["q"], ["x"]),
    (GrammarKind.STRUCTURAL_TAG, tag({"type": "tag", **CALL}), ["<f=a>12</f>"], ["12", "<f=a>x</f>"]),
    (
        GrammarKind.STRUCTURAL_TAG,
        tag({"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"}),
        ["<t>free <b> text</t>"],
        ["<t>open", "<t>a</t>b"],
    ),
    (
        GrammarKind.STRUCTURAL_TAG,
        tag({"type": "triggered_tags", "triggers": ["<f"], "tags": [CALL]}),
        ["", "text", "text <f=a>12</f> and <f=a>3</f>"],
        ["<f=b>", "text <f=a>x</f>"],
    ),
    (
        GrammarKind.STRUCTURAL_TAG,
        tag({"type": "triggered_tags", "triggers": ["<f"], "tags": [CALL], "at_least_one": True}),
        ["<f=a>1</f>", "<f=a>1</f> and <f=a>2</f>."],
        ["", "text", "text <f=a>1</f>"],
    ),
    (
        GrammarKind.STRUCTURAL_TAG,
        tag(
            {
                "type": "triggered_tags",
                "triggers": ["<f"],
                "tags": [CALL],
                "at_least_one": True,
                "stop_after_first": True,
            }
        ),
        ["<f=a>1</f>"],
        ["", "<f=a>1</f> more"],
    ),
    (
        GrammarKind.STRUCTURAL_TAG,
        tag({"type": "tags_with_separator", "tags": [CALL], "separator": ";", "at_least_one": True}),
        ["<f=a>1</f>", "<f=a>1</f>;<f=a>2</f>"],
        ["", "<f=a>1</f><f=a>2</f>"],
    ),
    (
        GrammarKind.STRUCTURAL_TAG,
        tag(
            {
                "type": "sequence",
                "elements": [
                    {"type": "or", "elements": [{"type": "const_string", "value": v} for v in ("a", "b")]},
                    {"type": "optional", "content": {"type": "const_string", "value": "c"}},
                    {"type": "star", "content": {"type": "const_string", "value": "d"}},
                    {"type": "plus", "content": {"type": "const_string", "value": "e"}},
                ],
            }
        ),
        ["ae", "bcdde", "aee"],
        ["a", "ce", "abe"],
    ),
    (
        GrammarKind.STRUCTURAL_TAG,
        {"structures": [{"begin": "<f>", "schema": INTEGER, "end": "</f>"}], "triggers": ["<"]},
        ["text <f>1</f>"],
        ["text <g>"],
    ),
]


@pytest.mark.parametrize(("kind", "text", "good", "bad"), CASES)
def test_each_kind_lets_through_what_it_says(kind: GrammarKind, text: object, good: list[str], bad: list[str]) -> None:
    assert [follows(matcher_of(kind, text), one) for one in good] == [True] * len(good)
    assert [follows(matcher_of(kind, text), one) for one in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("whitespace", "good", "bad"),
    [
        (None, ['{"a":1}', '{"a": 1}', '{\n "a":1}'], []),
        ("", ['{"a":1}'], ['{"a": 1}']),
        (" ", ['{ "a": 1 }'], ['{\n"a":1}']),
    ],
)
def test_white_space_is_as_it_is_asked_for(whitespace: str | None, good: list[str], bad: list[str]) -> None:
    schema = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "additionalProperties": False}
    made = [follows(matcher_of(GrammarKind.JSON, schema, whitespace=whitespace), one) for one in [*good, *bad]]
    assert made == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"type": "telepathy"}, "'telepathy' are not supported; there are const_string"),
        ({"type": "any_text", "excludes": ["x"]}, "excludes of any_text is not supported"),
        ({"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}, "style of json_schema is not supported"),
        ({"type": "tag", "begin": "a"}, "'content' is missing"),
        ({"type": "sequence", "elements": []}, "no list of at least one"),
        ({"type": "triggered_tags", "triggers": ["<g"], "tags": [CALL]}, "begins with none of the triggers"),
    ],
)
def test_what_is_not_known_of_structural_tags_is_named(form: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        matcher_of(GrammarKind.STRUCTURAL_TAG, tag(form))


def _powers(count: int) -> dict[str, object]:
    names = [[{"properties": {f"{part}{other}": {}}} for other in range(3)] for part in range(count)]
    return {"allOf": [{"anyOf": part} for part in names]}


ALIKE = "start: A\nA: /(.*a.{14}.*)/ & /(.*b.{14}.*)/ & ~/(.*c.{14}.*)/"
HOSTILE: list[tuple[GrammarKind, object]] = [
    (GrammarKind.JSON, _powers(12)),
    (GrammarKind.JSON, {"type": "string", "pattern": "(((a{1,100}){1,100}){1,100}){1,100}"}),
    (GrammarKind.JSON, {"type": "string", "minLength": 10**9}),
    (GrammarKind.JSON, {"type": "array", "items": INTEGER, "minItems": 10**6}),
    (GrammarKind.JSON, {"properties": {f"p{number}": INTEGER for number in range(900)}}),
    (GrammarKind.JSON, {"properties": {f"p{number}": INTEGER for number in range(6000)}}),
    (GrammarKind.JSON, {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    (GrammarKind.JSON, {"$ref": "http://127.0.0.1:1/schema.json"}),
    (GrammarKind.REGEX, "(.*a){20}.{2000}"),
    (GrammarKind.REGEX, "(a{1,1000}){1,1000}"),
    (GrammarKind.JSON, {"type": "integer", "multipleOf": 9_999_991}),
    (GrammarKind.JSON, {"anyOf": [{"type": "integer", "multipleOf": 9000 + more} for more in range(3)]}),
    (GrammarKind.JSON, {"anyOf": [{"type": "integer", "multipleOf": 9000}] * 40}),
    (GrammarKind.JSON, '{"type": "number", "multipleOf": 1e300}'),
    (GrammarKind.JSON, '{"type": "number", "multipleOf": 1e-300}'),
    (GrammarKind.JSON, '{"type": "number", "multipleOf": 1e999}'),
    (GrammarKind.STRUCTURAL_TAG, tag({"type": "json_schema", "json_schema": {"multipleOf": 9_999_991}})),
    (GrammarKind.GRAMMAR, 'start: %json {"type": "integer", "\\u006dultipleOf": 9999991}'),
    (GrammarKind.GRAMMAR, ALIKE),
    (GrammarKind.STRUCTURAL_TAG, tag({"type": "grammar", "grammar": ALIKE})),
    (GrammarKind.GRAMMAR, "start: start"),
    (GrammarKind.GRAMMAR, "start: " + "(" * 5000 + '"a"' + ")" * 5000),
]


@pytest.mark.parametrize(("kind", "text"), HOSTILE, ids=range(len(HOSTILE)))
def test_none_takes_longer_than_its_bounds(kind: GrammarKind, text: object) -> None:
    """A hundredth of a second to half of one, each, on one core."""
    try:
        matcher = matcher_of(kind, text)
    except InvalidRequestError:
        return
    for _ in range(3):
        mask = matcher.mask([], [EOS])
        assert mask is not None or matcher.problem


@pytest.mark.parametrize(
    ("schema", "good"),
    [
        ({"type": "number", "multipleOf": 0.01}, "1.25"),
        ({"type": "integer", "multipleOf": 3600}, "7200"),
        ({"properties": {"a": {"type": "integer", "multipleOf": 60}, "b": {"multipleOf": 0.5}}}, '{"a": 120}'),
    ],
)
def test_steps_of_numbers_that_people_use_are_followed(schema: dict[str, object], good: str) -> None:
    assert follows(matcher_of(GrammarKind.JSON, schema), good)


@pytest.mark.parametrize(
    "text", ['start: "a & ~b" // & ~', "start: /a&[~]/", 'start: A~3 "&"\nA: "~"~1..2', "start: /&\\/~/"]
)
def test_marks_in_texts_and_before_numbers_join_no_patterns(text: str) -> None:
    matcher_of(GrammarKind.GRAMMAR, text)


def test_the_text_of_a_choice_among_many_is_whole() -> None:
    """Each was a place of its own for the parser, and over 10,000 it could not go on behind the first token."""
    many = matcher_of(GrammarKind.CHOICE, [f"value-{number}" for number in range(10_500)])
    assert follows(many, "value-10499") and not follows(many.fork(), "value-10500")
    with_nothing = matcher_of(GrammarKind.CHOICE, ["", "a", "ab"])
    assert [follows(with_nothing.fork(), text) for text in ("", "a", "ab", "b")] == [True, True, True, False]


def test_a_mask_of_a_text_that_can_be_read_in_many_ways_ends() -> None:
    """With llguidance's own bound it took minutes."""
    rules = "\n".join(f"r{number}: r{number + 1} r{number + 1} | r{number + 1}" for number in range(60))
    matcher = matcher_of(GrammarKind.GRAMMAR, f'start: r0\n{rules}\nr60: "a" | ""')
    output: list[int] = []
    while len(output) < 60 and matcher.mask(output, [EOS]) is not None:
        output.append(ord("a"))
    assert "Too many items" in matcher.problem


async def test_a_compiled_one_is_kept_and_the_oldest_goes() -> None:
    kept = grammars(GrammarLimits(max_kept=2))
    texts = ["a", "b", "a", "c", "a"]
    for text in texts:
        assert follows(await kept.matcher(Grammar(kind=GrammarKind.REGEX, text=text)), text)
    assert repr(kept) == "<Grammars 2 compiled, 0 being compiled>"


async def test_what_takes_too_long_is_refused_and_what_waits_behind_it_is_never_begun() -> None:
    begun, free = threading.Event(), threading.Event()

    def read() -> LLTokenizer:
        begun.set()
        free.wait()
        return byte_vocabulary(VOCAB, EOS)

    own = Grammars(read, [EOS], limits=GrammarLimits(compile_s=0.05, max_waiting=2))
    first, gone = (asyncio.create_task(own.matcher(Grammar(kind=GrammarKind.REGEX, text=text))) for text in "ac")
    try:
        await asyncio.to_thread(begun.wait)
        with pytest.raises(OverloadedError, match="2 grammars are being compiled"):
            await own.matcher(Grammar(kind=GrammarKind.REGEX, text="b"))
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        with pytest.raises(OverloadedError, match="other grammars"):
            await own.matcher(Grammar(kind=GrammarKind.REGEX, text="b"))
        with pytest.raises(InvalidRequestError, match=r"not compiled within 0\.05 s"):
            await first
        async with asyncio.timeout(30):
            while repr(own) != "<Grammars 0 compiled, 1 being compiled>":  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
        free.set()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.gather(*others, return_exceptions=True)
        assert repr(own) == "<Grammars 1 compiled, 0 being compiled>"
    finally:
        free.set()
        own.close()


async def test_one_that_comes_as_the_last_client_of_its_grammar_leaves_is_not_ended_with_it() -> None:
    free, made = asyncio.Event(), 0

    async def beside(work: Callable[[], object]) -> Any:
        nonlocal made
        made += 1
        await free.wait()
        return work()

    own = Grammars(partial(byte_vocabulary, VOCAB, EOS), [EOS], beside=beside)
    before = asyncio.create_task(own.matcher(Grammar(kind=GrammarKind.REGEX, text="b")))
    leaves = asyncio.create_task(own.matcher(Grammar(kind=GrammarKind.REGEX, text="a")))
    while not made:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
    leaves.cancel()
    comes = asyncio.create_task(own.matcher(Grammar(kind=GrammarKind.REGEX, text="a")))
    free.set()
    assert follows(await before, "b") and follows(await comes, "a") and leaves.cancelled() and made == 2
    assert repr(own) == "<Grammars 2 compiled, 0 being compiled>"


async def test_a_wrong_one_is_judged_anew_and_the_loop_is_free_meanwhile() -> None:
    own = Grammars(partial(byte_vocabulary, VOCAB, EOS), [EOS])
    try:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="unclosed"):
                await own.matcher(Grammar(kind=GrammarKind.REGEX, text="["))
        assert repr(own) == "<Grammars 0 compiled, 0 being compiled>"
    finally:
        own.close()


def test_special_tokens_in_tags_are_those_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<call>", "</call>", "<end>"])
    called, closed, end = (tokenizer.token_to_id(name) for name in ("<call>", "</call>", "<end>"))
    vocabulary = folder_vocabulary(saved(tokenizer, tmp_path), end + 10, [end])
    form = {"type": "triggered_tags", "triggers": ["<call>"], "tags": [{**CALL, "begin": "<call>", "end": "</call>"}]}
    made = Grammars(lambda: vocabulary, [end], beside=at_once)
    matcher = asyncio.run(made.matcher(Grammar(kind=GrammarKind.STRUCTURAL_TAG, text=json.dumps(tag(form)))))
    digit = tokenizer.token_to_id("7")
    free = matcher.mask([], [end])
    inside = matcher.mask([called], [end])
    behind = matcher.mask([called, digit], [end])
    assert free is not None and free[called] and free[end] and not free[closed] and not free[end + 1 :].any()
    assert inside is not None and inside[digit] and not inside[called] and not inside[end]
    assert behind is not None and behind[closed] and not behind[end]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot be read for grammars"):
        folder_vocabulary(tmp_path, 10, [0])
