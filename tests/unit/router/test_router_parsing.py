"""What a model wrote, told apart: each dialect, cut anywhere; what is none of its calls; which one a template speaks.

The many cases are canitoolcall's (tests/conformance/test_tool_calls_conformance.py); these are one of a kind.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.call_texts import written

from router.parsing.dialects import DIALECTS, AnswerParser, dialect_of
from router.parsing.events import CallArguments, CallBegin, CallEnd, Content, Reasoning

TEMPLATES = Path(__file__).parents[2] / "support" / "chat_templates"
TOOLS = {
    "add": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "integer"}}},
    "say": {"type": "object", "properties": {"text": {"type": "string"}}},
}
Parsed = tuple[str, str, list[tuple[str, str, bool]]]


def parsed(name: str, pieces: Sequence[str], prompt_end: str = "") -> Parsed:
    """(content, reasoning, (name, arguments, whether it came to its end) of each call)."""
    parser = AnswerParser(DIALECTS[name], TOOLS, prompt_end)
    content, reasoning, calls = "", "", list[tuple[str, str, bool]]()
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.end():
        match event:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallBegin(called):
                calls.append((called, "", False))
            case CallArguments(text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text, False)
            case CallEnd():
                calls[-1] = (*calls[-1][:2], True)
    return content, reasoning, calls


ADD, SAY = ("add", '{"a": 1.5, "b": 2}', True), ("say", '{"text": "x </tool_call> \\"y\\""}', True)
ANSWERS = {
    "hermes": (
        '<think>\nWhat now\n</think>\n\nWell.\n<tool_call>\n{"name": "add", "arguments": {"a": 1.5, "b": 2}}\n'
        '</tool_call>\n<tool_call>\n{"arguments": {"text": "x </tool_call> \\"y\\""}, "name": "say"}\n</tool_call>',
        ("Well.", "What now", [ADD, SAY]),
    ),
    "llama3_json": (
        '{"name": "add", "parameters": {"a": 1.5, "b": 2}}; '
        '{"name": "say", "parameters": {"text": "x </tool_call> \\"y\\""}}',
        ("", "", [ADD, SAY]),
    ),
    "llama4_pythonic": (
        "[add(a=1.5, b=2), say(text='x </tool_call> \"y\"')]",
        ("", "", [ADD, SAY]),
    ),
    "mistral": (
        'Well.[TOOL_CALLS]add[ARGS]{"a": 1.5, "b": 2}[TOOL_CALLS]say[CALL_ID]123456789[ARGS]'
        '{"text": "x </tool_call> \\"y\\""}',
        ("Well.", "", [ADD, SAY]),
    ),
    "mistral_v7": (
        'Well.[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1.5, "b": 2}}, '
        '{"name": "say", "arguments": {"text": "x </tool_call> \\"y\\""}}]',
        ("Well.", "", [ADD, SAY]),
    ),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1.5, "b": 2}\n```<｜tool▁call▁end｜><｜tool▁call▁begin｜>say<｜tool▁sep｜>'
        '{"text": "x </tool_call> \\"y\\""}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ("", "", [ADD, SAY]),
    ),
    "deepseek_v31": (
        "Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>"
        '{"a": 1.5, "b": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>say<｜tool▁sep｜>'
        '{"text": "x </tool_call> \\"y\\""}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ("Well.", "", [ADD, SAY]),
    ),
    "deepseek_v32": (
        'Well.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">'
        '1.5</｜DSML｜parameter>\n<｜DSML｜parameter name="b" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="say">\n<｜DSML｜parameter name="text" string="true">x </tool_call> "y"'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        ("Well.", "", [ADD, SAY]),
    ),
    "kimi_k2": (
        "Well. <|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
        '{"a": 1.5, "b": 2}<|tool_call_end|><|tool_call_begin|>functions.say:1<|tool_call_argument_begin|>'
        '{"text": "x </tool_call> \\"y\\""}<|tool_call_end|><|tool_calls_section_end|>',
        ("Well. ", "", [ADD, SAY]),
    ),
    "kimi_k3": (
        "What now<|close|>think<|sep|><|open|>response<|sep|>Well.<|close|>response<|sep|><|open|>tools<|sep|>"
        '<|open|>call tool="add" index="1"<|sep|><|open|>argument key="a" type="number"<|sep|>1.5<|close|>argument'
        '<|sep|><|open|>argument key="b" type="number"<|sep|>2<|close|>argument<|sep|><|close|>call<|sep|>'
        '<|open|>call tool="say" index="2"<|sep|><|open|>argument key="text" type="string"<|sep|>x </tool_call> "y"'
        "<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>",
        ("Well.", "What now", [ADD, SAY]),
    ),
    "gemma4": (
        "<|channel>thought\nWhat now<channel|>Well.<|tool_call>call:add{a:1.5,b:2}<tool_call|>"
        '<|tool_call>call:say{text:<|"|>x </tool_call> "y"<|"|>}<tool_call|>',
        ("Well.", "What now", [ADD, SAY]),
    ),
    "qwen3_xml": (
        "<think>\nWhat now\n</think>\n\n<tool_call>\n<function=add>\n<parameter=a>\n1.5\n</parameter>\n<parameter=b>\n2"
        "\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=say>\n<parameter=text>\n"
        'x </tool_call> "y"\n</parameter>\n</function>\n</tool_call>',
        ("", "What now", [ADD, SAY]),
    ),
    "glm": (
        "\n<think>What now</think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1.5</arg_value>\n"
        "<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>say\n<arg_key>text</arg_key>\n"
        '<arg_value>x </tool_call> "y"</arg_value>\n</tool_call>',
        ("", "What now", [ADD, SAY]),
    ),
    "glm47": (
        "<think>What now</think><tool_call>add<arg_key>a</arg_key><arg_value>1.5</arg_value><arg_key>b</arg_key>"
        "<arg_value>2</arg_value></tool_call><tool_call>say<arg_key>text</arg_key>"
        '<arg_value>x </tool_call> "y"</arg_value></tool_call>',
        ("", "What now", [ADD, SAY]),
    ),
    "gpt_oss": (
        "<|channel|>analysis<|message|>What now<|end|><|start|>assistant<|channel|>commentary<|message|>Well.<|end|>"
        "<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>"
        '{"a": 1.5, "b": 2}<|call|><|start|>assistant<|channel|>commentary to=functions.say<|message|>'
        '{"text": "x </tool_call> \\"y\\""}',
        ("Well.", "What now", [ADD, SAY]),
    ),
    "think": ("<think>What now</think>Well.", ("Well.", "What now", [])),
}


def test_every_dialect_is_tried() -> None:
    assert set(ANSWERS) == set(DIALECTS)


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_the_same_however_it_comes(name: str) -> None:
    text, wanted = ANSWERS[name]
    assert parsed(name, [text]) == parsed(name, list(text)) == wanted
    for at in range(1, len(text), 7):
        assert parsed(name, [text[:at], text[at:]]) == wanted


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_cut_off_anywhere_has_no_call_that_came_to_its_end_too_early(name: str) -> None:
    text, (_, _, calls) = ANSWERS[name]
    for at in range(len(text)):
        _, _, found = parsed(name, [text[:at]])
        assert [call for call in found if call[2]] == calls[: sum(call[2] for call in found)]


@pytest.mark.parametrize("name", sorted(set(DIALECTS) - {"gpt_oss", "kimi_k3"}))
@pytest.mark.parametrize(
    "text", ["", "Hello, it is 1 < 2.", "{}", '{"a": 1} is an object', "[1, 2]", "a <tool", "a [TOOL_"]
)
def test_what_is_no_call_is_the_answer(name: str, text: str) -> None:
    assert parsed(name, list(text)) == (text, "", [])


@pytest.mark.parametrize("close", ["</arg_value>", "</arg_value></tool_call>"])
def test_the_mark_that_ends_a_value_may_be_in_a_string_of_its_json(close: str) -> None:
    value = f'{{"x": "a {close} b", "y": ["{close}"]}}'
    text = f"<tool_call>add<arg_key>a</arg_key><arg_value>{value}</arg_value></tool_call>"
    assert parsed("glm", list(text)) == ("", "", [("add", f'{{"a": {value}}}', True)])
    broken = text.replace(value, "{'x': 1")
    assert parsed("glm", list(broken)) == ("", "", [("add", '{"a": "{\'x\': 1"}', True)])


def test_what_was_meant_as_a_call_and_is_none_is_given_back() -> None:
    text = "Well. <tool_call>not json</tool_call>"
    assert parsed("hermes", list(text)) == ("Well.<tool_call>not json</tool_call>", "", [])


def test_what_follows_a_mark_of_calls_and_names_none_is_given_back_once() -> None:
    assert parsed("mistral", list('Well.[TOOL_CALLS]{"a": 1}')) == ('Well.{"a": 1}', "", [])


def test_reasoning_that_the_prompt_has_opened_needs_no_mark() -> None:
    assert parsed("hermes", ["What now</think>Well."], "<|im_start|>assistant\n<think>\n") == ("Well.", "What now", [])
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert parsed("hermes", ["Well."], closed) == ("Well.", "", [])


@pytest.mark.parametrize("name", ["qwen3_xml", "gemma4"])
def test_a_call_ends_reasoning_that_the_model_forgot_to_end(name: str) -> None:
    text, calls = written(name, [("say", {"text": "x"})]), [("say", '{"text": "x"}', True)]
    opened = "<|channel>thought\n" if name == "gemma4" else "<think>\n"
    assert parsed(name, list(f"What now\n{text}"), opened) == ("", "What now", calls)
    assert parsed(name, list(f"{opened}Well, <tool_call> is\n{text}")) == ("", "Well, <tool_call> is", calls)
    parser = AnswerParser(DIALECTS[name], None, opened)
    assert {type(event) for event in parser.feed(text) + parser.end()} == {Reasoning}, "no tool was offered"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [("null", "{}"), ('"{\\"a\\": 1}"', '{"a": 1}'), ('"words"', '"words"'), ("[1]", "[1]"), ("{}", "{}")],
)
def test_arguments_in_other_forms(arguments: str, wanted: str) -> None:
    text = f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
    assert parsed("hermes", list(text)) == ("", "", [("add", wanted, True)])


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("deepseek.jinja", "deepseek_v3"),
        ("gpt_oss.jinja", "gpt_oss"),
        ("hermes_tools.jinja", "hermes"),
        ("llama3_tools.jinja", "llama3_json"),
        ("mistral_tools.jinja", "mistral_v7"),
        ("qwen25_tools.jinja", "hermes"),
        ("qwen3_thinking.jinja", "hermes"),
        ("smollm3.jinja", "think"),
        ("gemma.jinja", None),
        ("zephyr.jinja", None),
    ],
)
def test_a_template_says_which_dialect_its_model_speaks(template: str, wanted: str | None) -> None:
    assert dialect_of((TEMPLATES / template).read_text(encoding="utf-8")) == wanted
