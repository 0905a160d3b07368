"""Conversations as clients send them, each with what vLLM's server hands to the chat template of them (run on
vLLM 0.32), and the ways in which clients ask for a prompt."""

from pathlib import Path
from typing import Any

Message = dict[str, Any]

TEMPLATES = {file.stem: file.read_text() for file in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}
"""In the style of real models', by name."""
READ_PARTS = {"gemma", "mistral_small_dated"}
"""Those that vLLM gives a message's content in parts."""


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _call(arguments: object, *, name: str = "weather", call_id: str = "abcdef123") -> Message:
    return {"id": call_id, "function": {"arguments": arguments, "name": name}, "type": "function"}


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <somewhere> & «now»",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Which"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"enum": ["C", "F"], "type": "string"},
                "where": {"type": "object", "properties": {"lat": {"type": ["number", "null"]}}, "required": ["lat"]},
            },
            "required": ["place"],
        },
    },
}
BARE_TOOL = {"type": "function", "function": {"name": "now", "description": None, "parameters": None}}

USER, SYSTEM = {"role": "user", "content": "2 + 2?"}, {"role": "system", "content": " Be brief.\n"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [_call({"place": "Kraków", "days": [1, 2]})]}
ANSWERED = {"role": "tool", "content": '{"sky": "blue"}\nwarm', "tool_call_id": "abcdef123", "name": "weather"}

SEEN: dict[str, list[Message]] = {
    "one turn": [{"role": "user", "content": 'Zażółć <gęślą> & "jaźń" 😀\n'}],
    "several turns": [SYSTEM, USER, {"role": "assistant", "content": " 4. "}, {"role": "user", "content": "+ 1"}],
    "to continue": [USER, {"role": "assistant", "content": "It is, "}],
    "names": [{**USER, "name": "robert"}, {"role": "assistant", "content": "4", "name": "al"}, USER],
    "empty": [{"role": "system", "content": ""}, {"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
    "in parts": [SYSTEM, {"role": "user", "content": "rain\nbow\n{{ x }}"}],
    "tool calls": [USER, CALLING, ANSWERED],
    "two calls": [
        SYSTEM,
        USER,
        {**CALLING, "content": "Look:", "tool_calls": [_call({}), _call({}, name="now", call_id="ghi456jkl")]},
        ANSWERED,
        {"role": "tool", "content": "noon", "tool_call_id": "ghi456jkl"},
        {"role": "assistant", "content": "Blue, at noon."},
        USER,
    ],
    "reasoning": [
        USER,
        {"role": "assistant", "content": "<think>a</think>4", "reasoning": "easy\n", "reasoning_content": "easy\n"},
        USER,
        {"role": "assistant", "content": "4", "reasoning": "again", "reasoning_content": "again"},
    ],
    "a reasoned call": [USER, {**CALLING, "reasoning": "look", "reasoning_content": "look"}, ANSWERED],
    "developer": [{"role": "developer", "content": "Rule 1"}, USER],
    "late system": [USER, {"role": "assistant", "content": "4"}, SYSTEM, {**USER, "content": "and?"}],
    "two of a kind": [USER, USER],
    "no role that is known": [{"role": "narrator", "content": "Once"}, USER],
}
"""What the template sees: content as one string."""

SENT: dict[str, list[Message]] = {
    **SEEN,
    "in parts": [
        {**SYSTEM, "content": [_text(SYSTEM["content"])]},
        {"role": "user", "content": [_text("rain"), "bow", {"type": "input_text", "text": "{{ x }}"}]},
    ],
    "tool calls": [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"place": "Krak\\u00f3w", "days": [1, 2]}'},
                    "id": "abcdef123",
                }
            ],
        },
        {**ANSWERED, "content": [_text('{"sky": "blue"}'), _text("warm")]},
    ],
    "two calls": [
        *SEEN["two calls"][:2],
        {
            "role": "assistant",
            "content": "Look:",
            "tool_calls": [_call("[1]"), _call("{not JSON", name="now", call_id="ghi456jkl")],
        },
        *SEEN["two calls"][3:],
    ],
    "reasoning": [
        USER,
        {"role": "assistant", "content": "<think>a</think>4", "reasoning_content": "easy\n"},
        USER,
        {"role": "assistant", "content": "4", "reasoning": "again", "reasoning_content": "not this"},
    ],
    "a reasoned call": [
        USER,
        {**CALLING, "reasoning": "look", "tool_calls": [_call('{"place": "Kraków", "days": [1, 2]}')]},
        ANSWERED,
    ],
}
"""What the client sends."""

WAYS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
    {"tools": [TOOL, BARE_TOOL], "tool_choice": "none"},
    {"chat_template_kwargs": {"enable_thinking": False, "bos_token": "<own>", "controls": {"length": "long"}}},
    {"reasoning_effort": "high", "documents": [{"doc_id": 1, "text": "sky"}, {"doc_id": 2, "text": "sea"}]},
]
