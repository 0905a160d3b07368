"""The dialects by name, which of them a chat template speaks, and the parser of one answer."""

import importlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvcore.errors import ConfigError
from router.parsing import channels, json_calls, tagged_calls
from router.parsing.argument_forms import TaggedArguments, gemma_arguments, lines_without, numbered_json
from router.parsing.call_forms import CallForm
from router.parsing.events import Content, Event, Parse
from router.parsing.json_calls import Tools
from router.parsing.reader import Reader, Thought

_THINK = ("<think>", "</think>")
_MISTRAL_THINKS = (("[THINK]", "[/THINK]"), _THINK)
_DEEPSEEK_CALLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_QWEN_TEXT = lines_without("</parameter>", "<parameter=", "</function>", then="\n</parameter>")


def _text(r: Reader, tools: Tools) -> Parse[None]:
    while r.text or (yield from r.more()):
        if r.text:
            yield Content(r.take(len(r.text)))


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of models writes. `thinks`: the marks around its reasoning, where that is written apart
    from calls; `in_template`: texts of which a chat template that speaks it has all."""

    calls: Callable[[Reader, Tools], Parse[None]] = _text
    thinks: tuple[tuple[str, str], ...] = ()
    calls_end_thought: tuple[str, ...] = ()
    """How calls begin that end the reasoning, too, as models forget to: only where tools were offered."""
    special: bool = False
    """Some of its marks are special tokens, which are no part of a text unless they are asked for."""
    frames: bool = False
    """Every answer is written in it, not only one with calls."""
    short_ids: bool = False
    """The ids of calls have nine letters and digits."""
    form: CallForm | None = None
    """How a grammar has its calls made; None: as JSON, in another form than its own, and so with arguments that cannot
    be held to their schema in its own."""
    trims: bool = True
    """White space around the reasoning is no part of it, nor of the answer."""
    in_template: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    """Of one whose answers are framed: the marks behind which the answer itself may stand."""


DIALECTS: Mapping[str, Dialect] = {
    "gpt_oss": Dialect(
        channels.harmony,
        special=True,
        frames=True,
        form=CallForm(
            ("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>"),
            "",  # an end token is no text: it comes where only the end can
            separator=None,
            before=channels.THOUGHTS,
        ),
        in_template=("<|channel|>", "<|start|>"),
        answers=(
            "<|channel|>final<|message|>",
            "<|channel|>final <|constrain|>json<|message|>",
            "<|channel|>final<|constrain|>json<|message|>",
        ),
    ),
    "kimi_k3": Dialect(
        channels.xtml,
        special=True,
        frames=True,
        in_template=("<|open|>", "<|sep|>"),
        answers=("<|open|>response<|sep|>",),
    ),
    "gemma4": Dialect(
        tagged_calls.gemma,
        (("<|channel>thought\n", "<channel|>"),),
        calls_end_thought=("<|tool_call>call:",),
        special=True,
        form=CallForm(
            ("<|tool_call>call:", "{"), "<tool_call|>", triggers=("<|tool_call>",), arguments=gemma_arguments
        ),
        in_template=("<|tool_call>",),
    ),
    "kimi_k2": Dialect(
        json_calls.kimi,
        (_THINK,),
        special=True,
        trims=False,
        form=CallForm(
            ("<|tool_call_begin|>functions.", ":"),
            "<|tool_call_end|>",
            around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            arguments=numbered_json,
        ),
        in_template=("<|tool_calls_section_begin|>",),
    ),
    "deepseek_v32": Dialect(tagged_calls.dsml, (_THINK,), in_template=("｜DSML｜",)),
    "deepseek_v3": Dialect(
        json_calls.deepseek,
        (_THINK,),
        form=CallForm(
            ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n"),
            "\n```<｜tool▁call▁end｜>",
            separator="\n",
            around=_DEEPSEEK_CALLS,
        ),
        in_template=("<｜tool▁calls▁begin｜>", "```json"),
    ),
    "deepseek_v31": Dialect(
        json_calls.deepseek,
        (_THINK,),
        form=CallForm(("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"), "<｜tool▁call▁end｜>", around=_DEEPSEEK_CALLS),
        in_template=("<｜tool▁calls▁begin｜>",),
    ),
    "mistral": Dialect(
        json_calls.mistral,
        _MISTRAL_THINKS,
        special=True,
        short_ids=True,
        form=CallForm(("[TOOL_CALLS]", "[ARGS]"), "", triggers=("[TOOL_CALLS]",)),
        in_template=("[TOOL_CALLS]", "[ARGS]"),
    ),
    "mistral_v7": Dialect(
        json_calls.mistral,
        _MISTRAL_THINKS,
        special=True,
        short_ids=True,
        form=CallForm(
            ('{"name": "', '", "arguments": '),
            "}",
            separator=", ",
            around=("[TOOL_CALLS]", "]"),
            gap=r" ?\[",
            quoted=True,
        ),
        in_template=("[TOOL_CALLS]",),
    ),
    "qwen3_xml": Dialect(
        tagged_calls.qwen_xml,
        (_THINK,),
        calls_end_thought=("<tool_call>\n<function=",),
        form=CallForm(
            ("<tool_call>\n<function=", ">\n"),
            "</function>\n</tool_call>",
            triggers=("<tool_call>", "<function="),
            separator="\n",
            arguments=TaggedArguments(("<parameter=", ">\n"), "\n</parameter>", "\n", text=_QWEN_TEXT),
        ),
        in_template=("<tool_call>", "<function="),
    ),
    "glm47": Dialect(
        tagged_calls.glm,
        (_THINK,),
        form=CallForm(
            ("<tool_call>", ""),
            "</tool_call>",
            triggers=("<tool_call>",),
            arguments=TaggedArguments(("<arg_key>", "</arg_key><arg_value>"), "</arg_value>", ""),
        ),
        in_template=("</arg_key><arg_value>",),
    ),
    "glm": Dialect(
        tagged_calls.glm,
        (_THINK,),
        form=CallForm(
            ("<tool_call>", "\n"),
            "</tool_call>",
            triggers=("<tool_call>",),
            separator="\n",
            arguments=TaggedArguments(("<arg_key>", "</arg_key>\n<arg_value>"), "</arg_value>", "\n"),
        ),
        in_template=("<arg_key>",),
    ),
    "hermes": Dialect(
        json_calls.hermes,
        (_THINK,),
        form=CallForm(
            ('<tool_call>\n{"name": "', '", "arguments": '),
            "}\n</tool_call>",
            triggers=("<tool_call>",),
            separator="\n",
            quoted=True,
        ),
        in_template=("<tool_call>",),
    ),
    "llama4_pythonic": Dialect(json_calls.pythonic, in_template=("<|python_start|>",)),
    "llama3_json": Dialect(
        json_calls.llama3,
        form=CallForm(('{"name": "', '", "parameters": '), "}", triggers=('{"name": ',), separator="; ", quoted=True),
        in_template=("<|start_header_id|>", "parameters"),
    ),
    "think": Dialect(thinks=(_THINK,), in_template=("</think>",)),
}
"""In the order in which templates are looked at: the first whose texts a template has."""


def dialect_of(template: str) -> str | None:
    """The name of the dialect that a chat template speaks; None: it says nothing of tools, nor of thinking."""
    for name, dialect in DIALECTS.items():
        if all(text in template for text in dialect.in_template):
            return name
    return None


def find_dialect(setting: str, template: str) -> Dialect | None:
    """That of `model.parser`, where `template` is the chat template's text. None: answers are given out as they are
    written. Raises ConfigError."""
    if setting == "none":
        return None
    name = dialect_of(template) if setting == "auto" else setting
    if name is None or name in DIALECTS:
        return DIALECTS[name] if name is not None else None
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(DIALECTS)
        raise ConfigError(f"model.parser: {name!r} is no dialect: auto, none, package.module:name, or one of {known}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.parser: {name!r} cannot be imported: {error}") from error
    if not isinstance(found, Dialect):
        raise ConfigError(f"model.parser: {name!r} is no router.parsing.dialects.Dialect but {type(found).__name__}")
    return found


class AnswerParser:
    """Of one answer. `tools`: None: none was offered, so that nothing is a call. `prompt_end`: the last of the prompt,
    with which the template may have opened the reasoning; what users write there does not. `continues`: the answer goes
    on with the last message of the prompt."""

    def __init__(self, dialect: Dialect, tools: Tools | None, prompt_end: str, *, continues: bool = False) -> None:
        self._dialect = dialect
        self._tools = tools
        self._continues = continues
        self._reader = Reader(prompt_end)
        self._parse = self._whole()
        self.thought_over = False
        """No reasoning can follow."""

    def __repr__(self) -> str:
        return f"<AnswerParser {self._reader}>"

    @property
    def position(self) -> int:
        """How many characters have been told apart; of those behind it is not known yet what they are."""
        return self._reader.position

    @property
    def thoughts(self) -> deque[Thought]:
        """Where the reasoning stands."""
        return self._reader.thoughts

    def feed(self, text: str) -> list[Event]:
        """What these characters add."""
        self._reader.text += text
        return self._read_on()

    def end(self) -> list[Event]:
        """What was still held back."""
        self._reader.ended = True
        return self._read_on()

    def _read_on(self) -> list[Event]:
        found: list[Event] = []
        for event in self._parse:
            if event is None:
                break
            found.append(event)
        return found

    def _whole(self) -> Parse[None]:
        r, dialect = self._reader, self._dialect
        for opened, closed in dialect.thinks:
            inside = r.prompt_end.rstrip().endswith(opened.rstrip())
            if self._continues:  # the last message's reasoning may go on
                inside = r.prompt_end.rfind(opened) > r.prompt_end.rfind(closed)
            if not inside and dialect.trims:
                yield from r.skip_space()
            if inside or (yield from r.starts_with(opened)):
                if (yield from r.starts_with(opened)):
                    r.take(len(opened))
                ends = dialect.calls_end_thought if self._tools is not None else ()
                found = yield from r.thought_until((closed, *ends), trim=dialect.trims, skips=True)
                if found is not None and found in ends:
                    r.put_back(found)
                if dialect.trims:
                    yield from r.skip_space()
                break
        self.thought_over = not dialect.frames
        if self._tools is None and not dialect.frames:
            yield from _text(r, {})
        else:
            yield from dialect.calls(r, self._tools or {})
