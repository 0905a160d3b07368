"""Calls that must be made: what the nodes are told, what a grammar lets through, and how it is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.call_texts import written
from support.router_fakes import VOCAB, asking
from support.small_tokenizers import byte_level, saved

from kvcore.errors import InvalidRequestError
from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.grammars.vocabulary import folder_vocabulary
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.chat_tools import FunctionSpec, Tool
from router.api.fields.openai_schema import grammar_asked_by
from router.parsing.dialects import DIALECTS, Dialect
from router.parsing.events import CallArguments, CallBegin, CallEnd, Reasoning
from router.parsing.forced import ForcedParser
from router.text.tokenizer import ByteTokenizer

CITY = {"type": "object", "properties": {"city": {"enum": ["Zürich", "Rome"]}}, "required": ["city"]}
CITY |= {"additionalProperties": False}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "How is it?"}], "max_tokens": 500, "tools": TOOLS}
IN_HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
IN_LLAMA = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
IN_JSON = '[{"name": "get_weather", "parameters": {"city": "Rome"}}, {"name": "now", "parameters": {}}]'
IN_HARMONY = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}'
THOUGHT = "<|channel|>analysis<|message|>Rome?<|end|><|start|>assistant"
ROME = {"city": "Rome"}
BOTH = [("get_weather", ROME), ("now", {})]
IN_OWN = ["mistral", "mistral_v7", "deepseek_v3", "deepseek_v31", "kimi_k2", "qwen3_xml", "glm", "glm47", "gemma4"]


def tool(name: str, parameters: dict[str, object] | None, strict: bool | None = None) -> Tool:
    return Tool(FunctionSpec(name, None, parameters, strict))


def asked(dialect: str, choice: Any, tools: Any = None, **fields: Any) -> Any:
    tools = tools or [tool("get_weather", CITY), tool("now", None)]
    request = ChatRequest(messages=[], tools=tools, tool_choice=choice, **fields)
    form = grammar_asked_by(request, DIALECTS.get(dialect))
    return form and form.grammar


async def lets(grammar: Grammar, text: str) -> str:
    """`whole`: this is an answer; `begun`: a beginning of one; `no`: neither. As the engines' masks say."""
    grammars = Grammars(ByteTokenizer(VOCAB).vocabulary, (0,))
    try:
        matcher = await grammars.matcher(grammar)
        tokens = list(text.encode())
        for at in range(len(tokens)):
            mask = matcher.mask(tokens[:at], [0], may_end=True)
            if mask is None or not mask[tokens[at]]:
                return "no"
        mask = matcher.mask(tokens, [0], may_end=True)
        return "whole" if mask is not None and mask[0] else "begun"
    finally:
        grammars.close()


@pytest.mark.parametrize(
    ("dialect", "choice", "fields", "text", "verdict"),
    [
        ("hermes", "required", {}, IN_HERMES, "whole"),
        ("hermes", "required", {}, f"{IN_HERMES}\n{NOW}", "whole"),
        ("hermes", "required", {"parallel_tool_calls": False}, f"{IN_HERMES}\n{NOW}", "no"),
        ("hermes", "required", {}, IN_HERMES.replace("Rome", "Paris"), "no"),
        ("hermes", "required", {}, IN_HERMES[:-4], "begun"),
        ("hermes", "required", {}, "Let me see.", "no"),
        ("hermes", NAMED, {}, IN_HERMES, "whole"),
        ("hermes", NAMED, {}, NOW, "no"),
        ("hermes", NAMED, {}, f"{IN_HERMES}\n{IN_HERMES}", "no"),
        ("llama3_json", "required", {}, f"{IN_LLAMA}; {IN_LLAMA}", "whole"),
        ("llama3_json", NAMED, {}, IN_LLAMA, "whole"),
        ("gpt_oss", "required", {}, IN_HARMONY, "whole"),
        ("gpt_oss", "required", {}, f"{THOUGHT}{THOUGHT}{IN_HARMONY}", "whole"),
        ("gpt_oss", "required", {}, IN_HARMONY.replace("Rome", "Paris"), "no"),
        ("gpt_oss", "required", {}, f"{IN_HARMONY}{IN_HARMONY}", "no"),
        ("gpt_oss", NAMED, {}, "<|channel|>final<|message|>It rains.", "no"),
        ("gpt_oss", NAMED, {}, THOUGHT, "begun"),
        ("deepseek_v32", "required", {}, IN_JSON, "whole"),
        ("deepseek_v32", "required", {}, "[]", "no"),
        ("deepseek_v32", "required", {"parallel_tool_calls": False}, IN_JSON, "no"),
        ("deepseek_v32", NAMED, {}, '{"city": "Rome"}', "whole"),
        ("none", "required", {}, IN_JSON, "whole"),
        ("none", "required", {}, IN_JSON.replace("get_weather", "other"), "no"),
    ],
)
async def test_a_call_must_be_made_by_its_schema(
    dialect: str, choice: Any, fields: dict[str, Any], text: str, verdict: str
) -> None:
    assert await lets(asked(dialect, choice, **fields), text) == verdict


async def test_marks_that_are_special_tokens_are_those_tokens_and_end_tokens_come_last(tmp_path: Path) -> None:
    tokenizer = byte_level()
    marks = ["<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|call|>"]
    tokenizer.add_special_tokens(marks)
    folder, ends = saved(tokenizer, tmp_path), [tokenizer.token_to_id("<|call|>")]
    grammars = Grammars(lambda: folder_vocabulary(folder, tokenizer.get_vocab_size(), ends), ends)
    try:
        matcher = await grammars.matcher(asked("gpt_oss", "required"))
        tokens = tokenizer.encode(f"{THOUGHT}{IN_HARMONY}", add_special_tokens=False).ids
        assert tokens[0] == tokenizer.token_to_id("<|channel|>")
        for at, token in enumerate(tokens):
            mask = matcher.mask(tokens[:at], ends, may_end=True)
            assert mask is not None and mask[token] and not mask[ends[0]], (at, token)
        mask = matcher.mask(tokens, ends, may_end=True)
        assert mask is not None and mask[ends[0]] and int(mask.sum()) == 1
    finally:
        grammars.close()


async def test_only_strict_functions_are_held_to_their_schemas_where_none_must_be_called() -> None:
    wrong = IN_HERMES.replace("Rome", "Paris")
    assert asked("hermes", "auto") is None and asked("hermes", "none", [tool("get_weather", CITY, True)]) is None
    assert asked("gpt_oss", "auto", [tool("get_weather", CITY, True)]) is None
    strict = asked("hermes", "auto", [tool("get_weather", CITY, True), tool("now", CITY)])
    for text, verdict in (
        ("It rains.", "whole"),
        (f"Look: {IN_HERMES} and {NOW}", "whole"),
        (f"Look: {wrong}", "no"),
        (IN_HERMES.replace("get_weather", "other"), "no"),
    ):
        assert await lets(strict, text) == verdict, text
    loose = asked("hermes", "required", [tool("get_weather", CITY, False)])
    assert await lets(loose, wrong) == "whole"
    assert await lets(loose, wrong.replace('{"city": "Paris"}', "3")) == "no"


CODE = {"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]{3}$"}}, "required": ["code"]}
"""What is written as it is cannot be held to a pattern."""


@pytest.mark.parametrize("dialect", ["qwen3_xml", "glm", "glm47", "gemma4"])
async def test_arguments_that_cannot_be_held_to_their_schema_in_the_models_own_form_are_json(dialect: str) -> None:
    both = [tool("look_up", CODE), tool("now", None)]
    text = '[{"name": "look_up", "parameters": {"code": "ABC"}}, {"name": "now", "parameters": {}}]'
    assert await lets(asked(dialect, "required", both), text) == "whole"
    assert await lets(asked(dialect, "required", both), text.replace("ABC", "abc")) == "no"
    named = {"type": "function", "function": {"name": "look_up"}}
    assert await lets(asked(dialect, named, both), '{"code": "ABC"}') == "whole"


@pytest.mark.parametrize("dialect", ["qwen3_xml", "glm", "glm47", "gemma4"])
@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("look_up", CODE, "'look_up'.*leave out its strict"),
        ("look up", CITY, "'look up'.*its name has other characters"),
        ("f", {"type": "object", "properties": {}, "minProperties": 1}, "'minProperties'"),
        ("f", {"type": "object", "additionalProperties": {"type": "integer"}}, "without names"),
        ("f", {"type": "array"}, "another type than object"),
        ("f", {"type": "object", "properties": {}, "required": ["a"]}, "does not have"),
        ("f", {"type": "object", "properties": {"a": {}}, "required": [["a"]]}, "does not have"),
        ("f", {"type": "object", "properties": {"a b": {"type": "string"}}}, "'a b' has a name"),
        ("f", {"type": "object", "properties": {"a": {"$ref": "#/properties/b"}, "b": {}}}, "'#/properties/b'|none of"),
    ],
)
def test_a_strict_function_whose_calls_cannot_be_held_to_its_schema_is_refused_by_name(
    dialect: str, name: str, parameters: dict[str, object], says: str
) -> None:
    assert asked(dialect, "auto", [tool(name, parameters)]) is None
    with pytest.raises(InvalidRequestError, match=says) as raised:
        asked(dialect, "auto", [tool(name, parameters, True)])
    assert raised.value.param == "tools"


async def test_optional_objects_within_each_other_make_no_grammar_of_megabytes() -> None:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(3):
        schema = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(11)} | {"more": schema}}
    grammar = asked("gemma4", "required", [tool("f", schema)])
    assert len(grammar.text) < 20_000
    assert await lets(grammar, '[{"name": "f", "parameters": {"p3": "a"}}]') == "whole"


@pytest.mark.parametrize("dialect", ["qwen3_xml", "glm47", "gemma4", "hermes"])
def test_a_schema_that_is_none_is_the_grammars_question(dialect: str) -> None:
    asked(dialect, "required", [tool("f", {"type": "object", "properties": {"a": {"type": [{}]}}})])
    deep: dict[str, object] = {"type": "string"}
    for _ in range(440):  # two levels each: as many as JSON is read with
        deep = {"anyOf": [deep]}
    asked(dialect, "required", [tool("f", {"type": "object", "properties": {"a": deep}})])


async def test_beside_a_strict_function_the_arguments_of_others_are_free() -> None:
    for dialect, text in (
        ("gemma4", '<|tool_call>call:other{it:<|"|>rains<|"|>}<tool_call|>'),
        ("qwen3_xml", "<tool_call>\n<function=other>\n<parameter=it>\nrains\n</parameter>\n</function>\n</tool_call>"),
    ):
        strict = asked(dialect, "auto", [tool("get_weather", CITY, True), tool("other", CODE)])
        assert await lets(strict, f"Look: {text}") == "whole"


@pytest.mark.parametrize("dialect", ["hermes", "kimi_k2"])
async def test_where_one_call_may_be_made_a_strict_form_ends_behind_it(dialect: str) -> None:
    strict = asked(dialect, "auto", [tool("get_weather", CITY, True)], parallel_tool_calls=False)
    call = written(dialect, [("get_weather", ROME)])
    assert await lets(strict, f"Look: {call}") == await lets(strict, "It rains.") == "whole"
    assert await lets(strict, f"{call}{call}") == await lets(strict, f"{call} It rains.") == "no"


async def test_definitions_of_several_functions_are_the_lists() -> None:
    def of(city: object) -> dict[str, object]:
        return {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": city}}

    both = [tool("get_weather", of({"enum": ["Rome"]})), tool("now", of({"enum": ["Rome"]}))]
    assert await lets(asked("deepseek_v32", "required", both), IN_JSON) == "whole"
    assert await lets(asked("deepseek_v32", "required", both), IN_JSON.replace("Rome", "Paris")) == "no"
    with pytest.raises(InvalidRequestError, match="City"):
        asked("deepseek_v32", "required", [*both, tool("other", of({"enum": ["Paris"]}))])


@pytest.mark.parametrize(
    ("parser", "choice", "text", "calls", "reason"),
    [
        ("hermes", "required", f"{IN_HERMES}\n{NOW}", [("get_weather", ROME), ("now", {})], "tool_calls"),
        ("hermes", NAMED, f"<think>\nRome?\n</think>\n\n{IN_HERMES}", [("get_weather", ROME)], "stop"),
        (
            "deepseek_v32",
            "required",
            f"<think>Rome?</think>{IN_JSON}",
            [("get_weather", ROME), ("now", {})],
            "tool_calls",
        ),
        ("deepseek_v32", NAMED, '{"city": "Rome"}', [("get_weather", ROME)], "stop"),
        ("none", "required", IN_JSON, [("get_weather", ROME), ("now", {})], "tool_calls"),
        ("gpt_oss", NAMED, THOUGHT + IN_HARMONY, [("get_weather", ROME)], "stop"),
        *[
            (name, "required", written(name, [("get_weather", ROME), ("now", {})]), BOTH, "tool_calls")
            for name in IN_OWN
        ],
        ("kimi_k3", NAMED, '<|open|>response<|sep|>{"city": "Rome"}', [("get_weather", ROME)], "stop"),
    ],
)
async def test_calls_that_had_to_be_made_are_calls(
    parser: str, choice: Any, text: str, calls: list[tuple[str, object]], reason: str
) -> None:
    body = {**ASK, "tool_choice": choice}
    async with asking(text, parser) as (http, rig):
        (whole,) = (await http.post("/v1/chat/completions", json=body)).json()["choices"]
        lines = (await http.post("/v1/chat/completions", json={**body, "stream": True})).text
    sent = [request.sampling.grammar for node in rig.nodes.nodes for request in node.generates]
    assert len(sent) == 2 and None not in sent
    made = whole["message"]["tool_calls"]
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in made] == calls
    assert (whole["finish_reason"], whole["message"]["content"]) == (reason, None)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines.split("\n\n") if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    streamed = ["".join(p["function"]["arguments"] for p in parts if p["index"] == at) for at in range(len(calls))]
    assert [json.loads(text) for text in streamed] == [arguments for _, arguments in calls]
    assert len(parts) > len(calls), "arguments come as they are written"
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    assert not [delta for delta in deltas if delta.get("content")]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("tail", ["", " ", "\n"])
def test_a_list_of_calls_is_read_however_it_is_cut(size: int, tail: str) -> None:
    parser = ForcedParser(DIALECTS["hermes"], "", "")
    text = f"<think>Rome?</think>{IN_JSON}{tail}"
    events = [event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])]
    events += parser.end()
    assert "".join(one.text for one in events if isinstance(one, Reasoning)) == "Rome?"
    assert [one.name for one in events if isinstance(one, CallBegin)] == ["get_weather", "now"]
    assert sum(isinstance(one, CallEnd) for one in events) == 2
    assert "".join(one.text for one in events if isinstance(one, CallArguments)) == '{"city": "Rome"}{}'


def test_arguments_that_were_cut_off_are_no_whole_call() -> None:
    parser = ForcedParser(Dialect(), "get_weather", "")
    assert parser.feed('{"city": "Ro')[0] == CallBegin("get_weather")
    assert not [one for one in parser.end() if isinstance(one, CallEnd)]
    assert ForcedParser(Dialect(), "get_weather", "").end() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required", "tools": []},
        {"tool_choice": NAMED, "tools": None},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tool_choice": {"type": "function"}},
        {"tool_choice": "any"},
    ],
)
async def test_a_choice_that_cannot_be_is_named(fields: dict[str, Any]) -> None:
    async with asking("a", "hermes") as (http, _):
        reply = await http.post("/v1/chat/completions", json={**ASK, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")


async def test_what_must_be_called_comes_before_another_form() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1]}}}
    assert asked("deepseek_v32", "required", response_format=form).text.startswith('{"type": "array"')
    assert asked("deepseek_v32", "auto", response_format=form) == Grammar(kind=GrammarKind.JSON, text='{"enum": [1]}')


async def test_other_surfaces_have_calls_made_too() -> None:
    theirs = [{"name": "get_weather", "input_schema": CITY}]
    flat = [{"type": "function", "name": "get_weather", "parameters": CITY}]
    async with asking(IN_HERMES, "hermes") as (http, rig):
        for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
            reply = (await http.post("/v1/messages", json={**ASK, "tools": theirs, "tool_choice": choice})).json()
            assert (reply["stop_reason"], reply["content"][0]["input"]) == ("tool_use", ROME)
        for chosen in ("required", {"type": "function", "name": "get_weather"}):
            asks = {"input": "How is it?", "tools": flat, "tool_choice": chosen}
            output = (await http.post("/v1/responses", json=asks)).json()["output"]
            assert [(item["type"], json.loads(item["arguments"])) for item in output] == [("function_call", ROME)]
    sent = [request.sampling.grammar for node in rig.nodes.nodes for request in node.generates]
    assert len(sent) == 4 and {one.kind for one in sent if one} == {GrammarKind.STRUCTURAL_TAG}


async def test_each_argument_comes_with_those_definitions_alone_that_it_refers_to() -> None:
    def item(number: int) -> dict[str, object]:
        text, more = {"type": "string", "description": "x" * 1000}, {"$ref": f"#/$defs/a~1{number}"}
        return {"type": "object", "properties": {"text": text, "next": more}}

    made = {f"a/{number}": item(number) for number in range(20)}
    fields = {f"p{number}": {"type": "array", "items": {"$ref": f"#/$defs/a~1{number}"}} for number in range(20)}
    grammar = asked("qwen3_xml", "required", [tool("f", {"type": "object", "properties": fields, "$defs": made})])
    assert len(grammar.text) < 50_000
    value = '[{"text": "a", "next": {"text": "b"}}]'
    call = "<tool_call>\n<function=f>\n<parameter=p3>\n{}\n</parameter>\n</function>\n</tool_call>"
    assert await lets(grammar, call.format(value)) == "whole" and await lets(grammar, call.format("[1]")) == "no"
