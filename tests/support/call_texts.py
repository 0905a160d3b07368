"""Calls as models write them: by the chat template of each family, apart from the code that makes grammars of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]
"""The function's name and the arguments, in the order in which its schema has them."""


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _raw(value: object) -> str:
    return value if isinstance(value, str) else _json(value)


def _gemma(value: object) -> str:
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{key}:{_gemma(one)}" for key, one in value.items()) + "}"
        case list():
            return "[" + ",".join(map(_gemma, value)) + "]"
    return _json(value)


def _tags(form: str) -> Callable[[Mapping[str, object]], str]:
    def tagged(given: Mapping[str, object]) -> str:
        return "".join(form.replace("KEY", key).replace("VALUE", _raw(value)) for key, value in given.items())

    return tagged


D_CALL, D_SEP, D_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
D_AROUND = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
K_CALL, K_JSON, K_END = "<|tool_call_begin|>functions.", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
K_AROUND = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
QWEN = _tags("<parameter=KEY>\nVALUE\n</parameter>\n")
GLM, GLM47 = (_tags(f"<arg_key>KEY</arg_key>{nl}<arg_value>VALUE</arg_value>{nl}") for nl in ("\n", ""))
WRITES: dict[str, tuple[str, Callable[[Any], str], str, tuple[str, str]]] = {
    "hermes": ('<tool_call>\n{"name": "NAME", "arguments": GIVEN}\n</tool_call>', _json, "\n", ("", "")),
    "llama3_json": ('{"name": "NAME", "parameters": GIVEN}', _json, "; ", ("", "")),
    "gpt_oss": ("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>GIVEN", _json, "", ("", "")),
    "mistral": ("[TOOL_CALLS]NAME[ARGS]GIVEN", _json, "", ("", "")),
    "mistral_v7": ('{"name": "NAME", "arguments": GIVEN}', _json, ", ", ("[TOOL_CALLS] [", "]")),
    "deepseek_v3": (f"{D_CALL}function{D_SEP}NAME\n```json\nGIVEN\n```{D_END}", _json, "\n", D_AROUND),
    "deepseek_v31": (f"{D_CALL}NAME{D_SEP}GIVEN{D_END}", _json, "", D_AROUND),
    "kimi_k2": (f"{K_CALL}NAME:0{K_JSON}GIVEN{K_END}", _json, "", K_AROUND),
    "qwen3_xml": ("<tool_call>\n<function=NAME>\nGIVEN</function>\n</tool_call>", QWEN, "\n", ("", "")),
    "glm": ("<tool_call>NAME\nGIVEN</tool_call>", GLM, "\n", ("", "")),
    "glm47": ("<tool_call>NAMEGIVEN</tool_call>", GLM47, "", ("", "")),
    "gemma4": ("<|tool_call>call:NAMEGIVEN<tool_call|>", _gemma, "", ("", "")),
}
"""A call, how its arguments are written, what stands between two, around all: as the chat templates have them, with
the properties in the order in which a schema has them."""


def written(name: str, calls: Sequence[Call]) -> str:
    """All of them, in one answer of this dialect."""
    call, writes, between, (before, after) = WRITES[name]
    texts = [call.replace("NAME", called).replace("GIVEN", writes(given)) for called, given in calls]
    return before + between.join(texts) + after
