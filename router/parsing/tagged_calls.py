"""Dialects whose calls are tags around names and values: Qwen 3 Coder, GLM, DeepSeek from V3.2 on, Gemma 4.

Sources: the models' chat templates.
"""

import json
import re

from router.parsing.arguments import ATTRIBUTE, Arguments, as_json, ends_in_string
from router.parsing.events import CallArguments, CallBegin, CallEnd, Content, Parse
from router.parsing.json_calls import Tools
from router.parsing.reader import Reader, read_json

_QUOTE = '<|"|>'


def _text_value(r: Reader, *ends: str) -> Parse[str | None]:
    """A string up to the first of `ends`, as it comes, as JSON's text. Returns which one; None: it was cut off."""
    yield CallArguments('"')
    marker = yield from r.text_until(ends, _escaped)
    if marker is not None:
        yield CallArguments('"')
    return marker


def _escaped(text: str) -> CallArguments:
    return CallArguments(json.dumps(text, ensure_ascii=False)[1:-1])


def _value(r: Reader, arguments: Arguments, key: str, *ends: str) -> Parse[str | None]:
    """One value up to the first of `ends`, which is returned."""
    yield CallArguments(arguments.key(key))
    if arguments.is_text(key):
        return (yield from _text_value(r, *ends))
    text, marker = yield from _json_up_to(r, *ends)
    if marker is not None:
        yield CallArguments(arguments.value(key, text))
    return marker


def _json_up_to(r: Reader, *ends: str) -> Parse[tuple[str, str | None]]:
    """(a value up to the first of `ends` that is not within a string of its JSON, which one that is)."""
    text, marker = yield from r.take_until(*ends)
    while marker is not None and ends_in_string(text):
        more, again = yield from r.take_until(*ends)
        text, marker = text + marker + more, again
    return text, marker


def qwen_xml(r: Reader, tools: Tools) -> Parse[None]:
    """`<tool_call><function=NAME><parameter=KEY>…</parameter></function></tool_call>`, each tag and value on lines of
    its own (Qwen 3 Coder, Qwen 3.5)."""
    while (yield from r.text_until(("<tool_call>", "<function="), Content, trim=True)) is not None:
        yield from r.skip_space()
        yield from r.accept("<function=")
        name, found = yield from r.take_until(">", "</tool_call>")
        if found != ">":
            continue
        yield CallBegin(name.strip())
        arguments = Arguments(tools.get(name.strip()))
        ends = ("<parameter=", "</function>", "</tool_call>")
        marker = yield from r.text_until(ends, None)
        while marker == "<parameter=":
            key, _ = yield from r.take_until(">")
            closed = yield from _qwen_value(r, arguments, key)
            marker = closed if closed in (None, *ends) else (yield from r.text_until(ends, None))
        if marker is None:
            return
        yield CallArguments(arguments.end())
        yield CallEnd()
        if marker == "</function>":
            yield from r.accept("</tool_call>")
        yield from r.skip_space()


def _qwen_value(r: Reader, arguments: Arguments, key: str) -> Parse[str | None]:
    """Returns the tag that ends it; one that was left out is made up for by the next."""
    # On lines of its own it ends with a line that begins with a tag: tags within a line are text.
    if not (yield from r.starts_with("\n")):
        return (yield from _value(r, arguments, key, "</parameter>"))
    if not (yield from r.starts_with("\n</parameter>")):
        r.take(1)
    marker = yield from _value(r, arguments, key, "\n</parameter>", "\n<parameter=", "\n</function>")
    return marker and marker.strip()


def glm(r: Reader, tools: Tools) -> Parse[None]:
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>…</arg_value></tool_call>`, with newlines between (GLM 4.5) or
    none (4.7 on)."""
    while (yield from r.text_until(("<tool_call>",), Content, trim=True)) is not None:
        name, marker = yield from r.take_until("<arg_key>", "</tool_call>")
        if marker is None:
            return
        yield CallBegin(name.strip())
        arguments = Arguments(tools.get(name.strip()))
        while marker == "<arg_key>":
            key, _ = yield from r.take_until("</arg_key>")
            yield from r.text_until(("<arg_value>",), None)
            if (yield from _value(r, arguments, key.strip(), "</arg_value>")) is None:
                return
            marker = yield from r.text_until(("<arg_key>", "</tool_call>"), None)
        if marker is None:
            return
        yield CallArguments(arguments.end())
        yield CallEnd()
        yield from r.skip_space()


def dsml(r: Reader, tools: Tools) -> Parse[None]:
    """`<｜DSML｜function_calls>` (V3.2), `<｜DSML｜tool_calls>` (V4) or `<｜DSML｜ calls>` (V4.1), in it
    `<｜DSML｜invoke name="…">` with `<｜DSML｜parameter name="…" string="true">…</｜DSML｜parameter>`, where
    `string="false"` says that the value is JSON (DeepSeek)."""
    openers = ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "<｜DSML｜ calls>")
    while (opener := (yield from r.text_until(openers, Content, trim=True))) is not None:
        gap = " " if opener == openers[2] else ""
        invoke, parameter = f"<｜DSML｜{gap}invoke", f"<｜DSML｜{gap}parameter"
        closers = (f"</｜DSML｜{gap}invoke>", opener.replace("<", "</", 1))
        while (yield from r.text_until((invoke, closers[1]), None)) == invoke:
            head, found = yield from r.take_until(">")
            name = dict(ATTRIBUTE.findall(head)).get("name", "")
            if found is None or not name:
                return
            yield CallBegin(name)
            arguments, marker = Arguments(None), closers[0] if head.endswith("/") else None
            while marker is None and (yield from r.text_until((parameter, closers[0]), None)) == parameter:
                if not (yield from _dsml_parameter(r, arguments, f"</｜DSML｜{gap}parameter>")):
                    return
            yield CallArguments(arguments.end())
            if r.ended and not r.text and marker is None:
                return
            yield CallEnd()
        yield from r.skip_space()


def _dsml_parameter(r: Reader, arguments: Arguments, end: str) -> Parse[bool]:
    head, found = yield from r.take_until(">")
    if found is None:
        return False
    said = dict(ATTRIBUTE.findall(head))
    yield CallArguments(arguments.key(said.get("name", "")))
    if said.get("string") != "false":
        return (yield from _text_value(r, end)) is not None
    text, marker = yield from _json_up_to(r, end)
    if marker is None:
        return False
    yield CallArguments(as_json(text.strip(), text))
    return True


def gemma(r: Reader, tools: Tools) -> Parse[None]:
    """`<|tool_call>call:NAME{key:<|"|>text<|"|>,other:1.5}<tool_call|>` (Gemma 4). A call comes when it is whole."""
    while (yield from r.text_until(("<|tool_call>",), Content)) is not None:
        yield from r.accept("call:")
        r.record()
        name, found = yield from r.take_until("{", "<tool_call|>")
        if found != "{":
            continue
        r.forget()
        text = "{"
        while True:
            piece, marker = yield from r.take_until(_QUOTE, "<tool_call|>")
            if marker is None:
                return
            if marker != _QUOTE:
                text += piece
                break
            inside, closed = yield from r.take_until(_QUOTE)
            if closed is None:
                return
            text += piece + json.dumps(inside, ensure_ascii=False)
        value = read_json(_quoted_keys(text))
        if isinstance(value, dict):
            yield CallBegin(name.strip())
            yield CallArguments(json.dumps(value, ensure_ascii=False))
            yield CallEnd()


_KEY = re.compile(r'("(?:[^"\\]|\\.)*")|(?<=[{,])\s*([^"{}\[\],:]+?)\s*(?=:)')


def _quoted_keys(text: str) -> str:
    """JSON of an object whose keys have no quotes; its strings have theirs."""
    return _KEY.sub(lambda found: found[1] or json.dumps(found[2], ensure_ascii=False), text)
