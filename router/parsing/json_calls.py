"""Dialects whose calls are JSON: Hermes and Qwen, Llama, Mistral, DeepSeek up to V3.1, Kimi K2.

Sources: the models' chat templates, as quoted at each.
"""

import ast
import json
from collections.abc import Mapping

from router.parsing.events import CallArguments, CallBegin, CallEnd, Content, Parse
from router.parsing.reader import Reader, read_json

Tools = Mapping[str, Mapping[str, object]]
"""The JSON schema of the arguments of each tool that was offered, by its name."""
_ARGUMENTS = ("arguments", "parameters")


def hermes(r: Reader, tools: Tools) -> Parse[None]:
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`, any number of them (Hermes 2 Pro, Qwen 2.5, Qwen 3)."""
    while (yield from r.text_until(("<tool_call>",), Content, trim=True)) is not None:
        if not (yield from call_object(r, marker="<tool_call>")):
            continue
        yield from r.accept("</tool_call>")
        yield from r.skip_space()


def llama3(r: Reader, tools: Tools) -> Parse[None]:
    """`{"name": …, "parameters": …}`, several with `;` between them, or after `<|python_tag|>` (Llama 3.1 to 3.3)."""
    yield from r.skip_space()
    while True:
        if r.text.startswith("{"):
            if not (yield from call_object(r, bare=True)):
                break
            yield from r.accept(";")
            yield from r.skip_space()
        elif not r.text or (yield from r.text_until(("<|python_tag|>",), Content)) is None:
            return
        else:
            yield from r.skip_space()
    yield from r.text_until(("<|eom_id|>",), Content)


def pythonic(r: Reader, tools: Tools) -> Parse[None]:
    """`[f(a=1), g(b='x')]`, the whole answer, between `<|python_start|>` and `<|python_end|>` or not (Llama 4)."""
    yield from r.skip_space()
    yield from r.accept("<|python_start|>")
    if (yield from r.starts_with("[")):
        while (yield from r.more()):
            pass
        text, _, rest = r.text.partition("<|python_end|>")
        calls = _python_calls(text.strip())
        if calls is not None:
            r.take(len(r.text))
            for name, arguments in calls:
                yield CallBegin(name)
                yield CallArguments(json.dumps(arguments, ensure_ascii=False))
                yield CallEnd()
            if rest.strip():
                yield Content(rest)
            return
    yield from r.text_until(("<|python_end|>",), Content)


def _python_calls(text: str) -> list[tuple[str, dict[str, object]]] | None:
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        calls = []
        for call in tree.elts:
            if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
                return None
            arguments = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
            json.dumps(arguments, allow_nan=False)
            calls.append((ast.unparse(call.func), arguments))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return calls


def mistral(r: Reader, tools: Tools) -> Parse[None]:
    """`[TOOL_CALLS] [{"name": …, "arguments": …}, …]` up to v7, `[TOOL_CALLS]NAME[ARGS]{…}` for each call from v11 on,
    where `[CALL_ID]ID` may stand before `[ARGS]` (mistral-common's tokenizers)."""
    while (yield from r.text_until(("[TOOL_CALLS]",), Content)) is not None:
        yield from r.skip_space()
        if (yield from r.accept("[")):
            while (yield from call_object(r)) and (yield from r.accept(",")):
                pass
            yield from r.accept("]")
            continue
        r.record()
        name, marker = yield from r.take_until("[ARGS]", "[CALL_ID]", "{", "[TOOL_CALLS]")
        call_id = ""
        if marker == "[CALL_ID]":
            call_id, marker = yield from r.take_until("[ARGS]", "{")
        if marker == "{":
            r.put_back(marker)
        if marker not in ("[ARGS]", "{") or not name.strip():
            yield from _give_back(r)
            continue
        r.forget()
        yield from _call(r, name.strip(), call_id.strip())


def deepseek(r: Reader, tools: Tools) -> Parse[None]:
    """`<｜tool▁calls▁begin｜>`, then calls: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a newline and the
    arguments in a fence of JSON (V3, R1), or `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}` (V3.1)."""
    while (yield from r.text_until(("<｜tool▁calls▁begin｜>",), Content, trim=True)) is not None:
        begin, end = "<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>"
        while (yield from r.text_until((begin, end), None)) == begin:
            name, found = yield from r.take_until("<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
            if found != "<｜tool▁sep｜>":
                continue
            yield from r.skip_space()
            if not r.text.startswith("{"):
                name, _ = yield from r.take_until("```json", "<｜tool▁call▁end｜>")
            yield from _call(r, name.strip())
            yield from r.text_until(("<｜tool▁call▁end｜>",), None)
        yield from r.skip_space()


def kimi(r: Reader, tools: Tools) -> Parse[None]:
    """`<|tool_calls_section_begin|>`, then calls: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}
    <|tool_call_end|>`; what stands before the arguments is the call's id (Kimi K2)."""
    while (yield from r.text_until(("<|tool_calls_section_begin|>",), Content)) is not None:
        begin, end = "<|tool_call_begin|>", "<|tool_calls_section_end|>"
        while (yield from r.text_until((begin, end), None)) == begin:
            said, found = yield from r.take_until("<|tool_call_argument_begin|>", "<|tool_call_end|>")
            if found != "<|tool_call_argument_begin|>":
                continue
            call_id = said.strip()
            name = call_id.removeprefix("functions.").rpartition(":")[0] or call_id
            yield from _call(r, name, call_id)
            yield from r.text_until(("<|tool_call_end|>",), None)


def call_object(r: Reader, *, marker: str = "", bare: bool = False) -> Parse[bool]:
    """A call as an object with its name and its arguments, in any order. False: it was none, and its text, `marker`
    before it, was given out as content, unless the end of all text cut it off. `bare`: nothing but its form tells that
    it is a call, so that it must have arguments."""
    # The arguments are given out as they come as soon as the name is known. Then there is no way back: what follows
    # and is no JSON leaves the call without its end. Until then all that was read is kept, to be given back.
    r.record()
    name: str | None = None
    held: str | None = None
    begun = False
    if not (yield from r.accept("{")):
        return (yield from _give_back(r, marker))
    while not (yield from r.accept("}")):
        yield from r.accept(",")
        key = yield from r.json_string()
        if key is None or not (yield from r.accept(":")):
            break
        if key == "name" and name is None:
            name = yield from r.json_string()
            if not name:
                break
        elif key in _ARGUMENTS and name is not None and not begun:
            r.forget()
            begun = True
            yield CallBegin(name)
            if not (yield from arguments_value(r)):
                return False
        else:
            value = yield from r.json_value()
            if value is None:
                break
            held = value if key in _ARGUMENTS else held
    else:
        if begun:
            yield CallEnd()
            return True
        if name and (held is not None or not bare):
            r.forget()
            yield CallBegin(name)
            yield CallArguments(_unwrapped(held or "{}"))
            yield CallEnd()
            return True
    return False if begun else (yield from _give_back(r, marker))


def _call(r: Reader, name: str, call_id: str = "") -> Parse[None]:
    """The arguments of a call whose name is known."""
    yield CallBegin(name, call_id)
    if (yield from arguments_value(r)):
        yield CallEnd()


def arguments_value(r: Reader) -> Parse[bool]:
    """Arguments as they come. False: they did not come to their end."""
    yield from r.skip_space()
    if r.text.startswith("{"):
        return (yield from r.json_value(CallArguments)) is not None
    raw = yield from r.json_value()
    if raw is None:
        return False
    yield CallArguments(_unwrapped(raw))
    return True


def _unwrapped(raw: str) -> str:
    """Some models write their arguments as a string that holds JSON, and null for none."""
    value = read_json(raw)
    if value is None:
        return "{}"
    return value if isinstance(value, str) and isinstance(read_json(value), dict) else raw


def _give_back(r: Reader, before: str = "") -> Parse[bool]:
    """What was read was no call. What the end cut off is left out: half a call is of no use as text."""
    text = before + r.recorded()
    if text and (r.text or not r.ended):
        yield Content(text)
    return False
