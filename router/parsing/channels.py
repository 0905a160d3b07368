"""Dialects whose whole answer is messages with a channel each: gpt-oss (Harmony) and Kimi K3 (XTML).

Source of Harmony: https://github.com/openai/harmony, docs/format.md.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence

from router.parsing.arguments import ATTRIBUTE, Arguments, as_json
from router.parsing.events import CallArguments, CallBegin, CallEnd, Content, Parse, Reasoning
from router.parsing.json_calls import Tools
from router.parsing.reader import Make, Reader

_RECIPIENT = re.compile(r"to=([^\s<]+)")
_MAKES: Mapping[str, Make] = {"analysis": Reasoning, "final": Content, "commentary": Content, "": Content}
"""By channel. What is on any other is left out."""
THOUGHTS: Mapping[str, object] = {
    "type": "star",
    "content": {
        "type": "sequence",
        "elements": [
            {
                "type": "tag",
                "begin": "<|channel|>analysis<|message|>",
                "content": {"type": "any_text"},
                "end": "<|end|>",
            },
            {"type": "const_string", "value": "<|start|>assistant"},
        ],
    },
}
"""What gpt-oss may write before a call, as a structural tag."""
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")


def harmony(r: Reader, tools: Tools) -> Parse[None]:
    """`<|channel|>analysis<|message|>…<|end|><|start|>assistant to=functions.NAME<|channel|>commentary<|message|>{…}`:
    what is on `analysis` is reasoning, on `final` and `commentary` the answer, and whatever names a function as its
    recipient, in the role or in the channel, is a call. Messages to others are none of the answer."""
    if r.prompt_end.rfind("<|message|>") > max(map(r.prompt_end.rfind, _ENDS)):  # it goes on with a message
        channel = r.prompt_end.rpartition("<|channel|>")[2].partition("<|")[0].strip()
        yield from _message(r, _MAKES.get(channel, Content), _ENDS)
    while r.text or (yield from r.more()):
        role, marker = yield from r.take_until("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
        if marker is None:
            return
        header = ""
        if marker == "<|channel|>":
            header, marker = yield from r.take_until("<|message|>", "<|end|>", "<|start|>", "<|channel|>")
        if marker == "<|channel|>":
            r.put_back(marker)
        if marker != "<|message|>":
            continue
        channel = header.strip().split("<|")[0].split(" ")[0]
        recipient = _RECIPIENT.search(f"{role} {header}")
        if recipient is not None and recipient[1].startswith("functions."):
            yield CallBegin(recipient[1].removeprefix("functions."))
            raw = yield from r.json_value(CallArguments)
            if raw is not None:
                yield CallEnd()
            yield from r.text_until(_ENDS, None)
        elif recipient is not None and recipient[1] != "assistant":
            yield from r.text_until(_ENDS, None)
        else:
            yield from _message(r, _MAKES.get(channel), _ENDS)


def _message(r: Reader, make: Make | None, ends: Sequence[str]) -> Parse[str | None]:
    return (yield from (r.thought_until(ends) if make is Reasoning else r.text_until(ends, make)))


def xtml(r: Reader, tools: Tools) -> Parse[None]:
    """`…<|close|>think<|sep|><|open|>response<|sep|>…<|close|>response<|sep|><|open|>tools<|sep|>` and in it
    `<|open|>call tool="…" index="1"<|sep|><|open|>argument key="…" type="string"<|sep|>…<|close|>argument<|sep|>`. An
    answer begins in the thinking or, where the prompt has opened it, in the response."""
    ends = ("<|close|>", "<|open|>response<|sep|>", "<|open|>tools<|sep|>")
    kind: Make = Content if r.prompt_end.rstrip().endswith("<|open|>response<|sep|>") else Reasoning
    while (marker := (yield from _message(r, kind, ends))) is not None:
        if marker == "<|close|>":
            tag, _ = yield from r.take_until("<|sep|>")
            kind = Content
            if tag in ("message", "tools"):
                return
        elif marker == ends[1]:
            kind = Content
        else:
            yield from _xtml_calls(r)


def _xtml_calls(r: Reader) -> Parse[None]:
    while (yield from r.text_until(("<|open|>call ", "<|close|>tools<|sep|>"), None)) == "<|open|>call ":
        head, found = yield from r.take_until("<|sep|>")
        name = dict(ATTRIBUTE.findall(head)).get("tool")
        if found is None or not name:
            return
        yield CallBegin(html.unescape(name))
        arguments = Arguments(None)
        while True:
            marker = yield from r.text_until(("<|open|>argument ", "<|close|>call<|sep|>"), None)
            if marker != "<|open|>argument ":
                break
            said, _ = yield from r.take_until("<|sep|>")
            attributes = dict(ATTRIBUTE.findall(said))
            text, closed = yield from r.take_until("<|close|>argument<|sep|>")
            if closed is None:
                return
            # A value may hold the closing tag as text: it ends where another argument or the call's end follows.
            while not (
                (yield from r.starts_with("<|open|>argument ")) or (yield from r.starts_with("<|close|>call<|sep|>"))
            ):
                more, again = yield from r.take_until("<|close|>argument<|sep|>")
                if again is None:
                    return
                text += closed + more
            is_text = attributes.get("type") == "string"
            value = json.dumps(text, ensure_ascii=False) if is_text else as_json(text.strip(), text)
            yield CallArguments(arguments.key(html.unescape(attributes.get("key", ""))) + value)
        if marker is None:
            return
        yield CallArguments(arguments.end())
        yield CallEnd()
