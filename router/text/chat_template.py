"""The model's chat template: from messages to the prompt that asks for the assistant's next one.

Owns the sandbox and what a template may call. Reads no file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvcore.errors import InvalidRequestError, ModelLoadError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    def __init__(self, template: jinja2.Template, special_tokens: Mapping[str, str]) -> None:
        self._template = template
        self._special_tokens = special_tokens

    def __repr__(self) -> str:
        return f"<ChatTemplate with {self._special_tokens}>"

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt. Raises InvalidRequestError with the template's own words where it refuses the messages."""
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequestError(f"the model's chat template refused it: {error}", param="messages") from error


def make_chat_template(source: object, settings: Mapping[str, object], folder: Path) -> ChatTemplate | None:
    """Of a template's text, or of several named ones, of which `default` counts; None where there is none.

    `settings`: of tokenizer_config.json, for the special tokens. `folder` is only named: ModelLoadError where the text
    is no template.
    """
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelLoadError(f"the chat template of {folder} cannot be read: {error}") from error
    return ChatTemplate(template, {name: _special_token(settings, name) for name in _SPECIAL_TOKENS})


def _special_token(settings: Mapping[str, object], name: str) -> str:
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _tojson(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
