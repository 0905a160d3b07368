"""Calls in each family's own form: what a grammar lets through, the dialect reads as the same calls, by their schemas.

Both ways: calls of random tools, written as the family's chat template writes them, must be let through and read back;
and whatever the masks let through, drawn byte by byte, must be read as calls whose arguments follow their schemas.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.call_texts import WRITES, Call, written
from support.grammar_walks import drawn_answer, lets

from router.parsing.call_forms import CallForm, forced_calls, strict_calls
from router.parsing.dialects import DIALECTS, AnswerParser
from router.parsing.events import CallArguments, CallBegin, CallEnd, Content

FORMS = {name: dialect.form for name, dialect in DIALECTS.items() if dialect.form is not None}
CLOSERS = ("</parameter>", "\n</parameter>", "</arg_value>", "</tool_call>", "<tool_call|>", "<|end|>", '<|"|>', "```")
KEYS = ["city", "unit", "a_b", "n2"]


Shaped = st.SearchStrategy[tuple[dict[str, Any], Any]]
"""A JSON schema and a value that follows it."""
words = st.text(st.sampled_from("ab é\"\\{}[],:'<\n"), max_size=8) | st.sampled_from([*CLOSERS, "null"])
scalars: Shaped = st.one_of(
    st.integers(-99, 99).map(lambda value: ({"type": "integer"}, value)),
    st.sampled_from([1.5, -0.25, 3.0]).map(lambda value: ({"type": "number"}, value)),
    st.booleans().map(lambda value: ({"type": "boolean"}, value)),
    words.map(lambda value: ({"type": "string"}, value)),
    st.sampled_from(["red", "blue", "1", "null"]).map(lambda value: ({"enum": ["red", "blue", "1", "null"]}, value)),
    st.sampled_from(["cat", "dog"]).map(lambda value: ({"type": "string", "const": value}, value)),
    st.sampled_from(["x", None]).map(lambda value: ({"anyOf": [{"type": "string"}, {"type": "null"}]}, value)),
    st.sampled_from(["x", None]).map(lambda value: ({"type": ["string", "null"]}, value)),
    st.sampled_from(["x", "y", None]).map(
        lambda value: ({"anyOf": [{"type": "string", "enum": ["x", "y"]}, {"type": "null"}]}, value)
    ),
)


@st.composite
def arrays(draw: st.DrawFn, of: Shaped) -> tuple[dict[str, Any], list[Any]]:
    schema, value = draw(of)
    return {"type": "array", "items": schema}, [value] * draw(st.integers(0, 2))


@st.composite
def objects(
    draw: st.DrawFn, of: st.SearchStrategy[tuple[dict[str, Any], Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    properties, value, required = {}, {}, []
    names = draw(st.permutations(KEYS))[: draw(st.integers(0, 3))]
    must = [name for name in names if draw(st.booleans())]
    for name in [*must, *(name for name in names if name not in must)]:
        properties[name], one = draw(of)
        if name in must:
            required.append(name)
        if name in must or draw(st.booleans()):
            value[name] = one
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}, value


values = st.recursive(scalars, lambda inner: arrays(inner) | objects(inner), max_leaves=3)
tools = st.lists(objects(values), min_size=1, max_size=3)
seeds = st.integers(0, 1 << 32)


def read(name: str, text: str, schemas: Mapping[str, Any]) -> list[Call]:
    """The calls in `text`, all whole, and nothing else."""
    parser = AnswerParser(DIALECTS[name], schemas, "")
    events = [event for character in text for event in parser.feed(character)] + parser.end()
    assert not [event for event in events if isinstance(event, Content)], text
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, CallBegin):
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            calls[-1][1] += event.text
    assert sum(isinstance(event, CallEnd) for event in events) == len(calls), text
    return [(called, json.loads(text)) for called, text in calls]


def shaped(form: CallForm, made: Sequence[tuple[Any, Any]]) -> tuple[dict[str, Any], list[Call]]:
    """(schema by name, a call of each) of those tools whose calls can be held to their schemas in `form`."""
    kept = [(f"do_{at}", *tool) for at, tool in enumerate(made) if form.can_write({f"do_{at}": tool[0]})]
    return {called: schema for called, schema, _ in kept}, [(called, value) for called, _, value in kept]


def can_be_written(name: str, calls: Sequence[Call]) -> bool:
    """A string that is written as it is cannot hold what ends it."""
    ends = {"qwen3_xml": "</parameter>", "glm": "</arg_value>", "glm47": "</arg_value>"}.get(name)
    as_they_are = [value for _, given in calls for value in given.values() if isinstance(value, str)]
    is_gemma = name == "gemma4" and '<|"|>' in str(calls)
    return not is_gemma and not any(ends in value for value in as_they_are if ends)


def check_written(name: str, made: Any) -> None:
    schemas, calls = shaped(FORMS[name], made)
    if calls and can_be_written(name, calls):
        calls = calls[:1] if FORMS[name].separator is None else calls
        text = written(name, calls)
        assert read(name, text, schemas) == calls
        assert lets(forced_calls(FORMS[name], schemas, one=len(calls) == 1), text) == "whole", text
        if FORMS[name].before is None:
            strict = strict_calls(FORMS[name], schemas, one=False)
            assert lets(strict, f"Look: {text}") == lets(strict, "It rains.") == "whole", text


def check_drawn(name: str, made: Any, seed: int) -> None:
    form, (schemas, _) = FORMS[name], shaped(FORMS[name], made)
    if schemas:
        is_one = seed % 2 == 0
        endings = [*CLOSERS, form.end, *form.around, *form.triggers]
        text = drawn_answer(forced_calls(form, schemas, one=is_one), random.Random(seed), endings)
        found = read(name, text, schemas)
        assert found and (len(found) == 1 or not is_one), text
        for called, arguments in found:
            jsonschema.validate(arguments, schemas[called])


def test_every_form_is_tried() -> None:
    assert set(WRITES) == set(FORMS)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=4)
@given(tools)
def test_calls_as_their_templates_write_them_are_let_through_and_read_back(name: str, made: Any) -> None:
    check_written(name, made)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=3)
@given(tools, seeds)
def test_whatever_is_let_through_is_read_as_calls_that_follow_their_schemas(name: str, made: Any, seed: int) -> None:
    check_drawn(name, made, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=40)
@given(tools, seeds)
def test_more_of_both(name: str, made: Any, seed: int) -> None:
    check_written(name, made)
    check_drawn(name, made, seed)
