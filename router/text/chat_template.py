"""The model's chat template: from messages to the prompt that asks for the assistant's next one.

Owns the sandbox and what a template may call and name: what Hugging Face's `apply_chat_template` gives it, after the
messages were brought into the form that vLLM's server gives them. Reads no file.
"""

import datetime
import json
from collections.abc import Mapping, Sequence

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvcore.errors import InvalidRequestError
from router.requests.spec import ChatPrompt
from router.text.message_content import join_parts, template_reads_parts, to_parts

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CUT_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Put behind the message to continue: the prompt ends where the template has put it. Its blank says whether the
template has trimmed the message."""


class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    def __init__(self, template: jinja2.Template, special_tokens: Mapping[str, str], *, reads_parts: bool) -> None:
        self._template = template
        self._special_tokens = special_tokens
        self._reads_parts = reads_parts

    def __repr__(self) -> str:
        return f"<ChatTemplate with {self._special_tokens}>"

    def render(self, chat: ChatPrompt) -> str:
        """The prompt. Raises InvalidRequestError with the template's own words where it refuses the messages."""
        messages = [self._message(message) for message in chat.messages]
        last = _mark_end(messages[-1]) if chat.continue_final_message else ""
        try:
            text = self._template.render(
                {
                    **self._special_tokens,
                    **chat.template_values,
                    "messages": messages,
                    "tools": None,
                    "documents": chat.documents,
                    "add_generation_prompt": chat.add_generation_prompt,
                }
            )
        except Exception as error:  # a template is a program that came with the model
            reason = f"the model's chat template refused it: {error}"
            raise InvalidRequestError(reason, param="messages") from error
        return _cut_at_mark(text, last) if chat.continue_final_message else text

    def _message(self, message: Mapping[str, object]) -> dict[str, object]:
        content = message.get("content")
        seen = {**message, "content": to_parts(content) if self._reads_parts else join_parts(content)}
        reasoning = seen.pop("reasoning_content", None)
        if reasoning is None:
            return seen
        # Older templates know it by other names. A template that writes whole messages out shows this order.
        return {"thinking": reasoning, **seen, "reasoning": reasoning, "reasoning_content": reasoning}


def compile_chat_template(source: str, settings: Mapping[str, object]) -> ChatTemplate:
    """`settings`: of tokenizer_config.json, for the special tokens. Raises ValueError where the text is no template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        template = environment.from_string(source)
        reads_parts = template_reads_parts(environment.parse(source))
    except (jinja2.TemplateError, SyntaxError, RecursionError, ValueError) as error:
        # Python's own errors: what jinja makes of a template can be nested too deeply for it.
        raise ValueError(str(error)) from error
    return ChatTemplate(template, special_tokens_of(settings), reads_parts=reads_parts)


def default_template(source: object) -> str | None:
    """A template's text, or of several named ones the text of `default`; None where there is none."""
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def special_tokens_of(settings: Mapping[str, object]) -> dict[str, str]:
    """Those that the model has. A template may ask whether one is defined."""
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


class _GenerationBlocks(Extension):
    """`{% generation %}` marks what training counts as the assistant's. Its body renders as if the tags were away."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # In a scope of its own, as in transformers: what is set inside is not seen outside.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: jinja2.runtime.Macro) -> str:
        text: str = caller()
        return text


def _mark_end(message: dict[str, object]) -> str:
    """Put the mark behind the message's text, of several parts the last one's; returns that text."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _CUT_MARK
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequestError("continue_final_message: the last message is empty", param="continue_final_message")
    text: str = content[-1]["text"]
    content[-1]["text"] = text + _CUT_MARK
    return text


def _cut_at_mark(prompt: str, last: str) -> str:
    at = prompt.rfind(_CUT_MARK.rstrip())
    if at < 0 or last.strip() not in prompt:
        reason = "continue_final_message: the model's chat template leaves parts of the last message out"
        raise InvalidRequestError(reason, param="continue_final_message")
    if prompt.startswith(_CUT_MARK, at):
        return prompt[:at]
    return prompt[:at].rstrip()  # the template trims messages: the last one's own blanks would not have been there


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    """The local time, as transformers gives it."""
    return datetime.datetime.now().strftime(layout)
