"""The model's chat template: from messages to the prompt that asks for the assistant's next one.

Owns what a template is given: what Hugging Face's `apply_chat_template` gives it, after the messages were brought into
the form that vLLM's server gives them. Reads no file.
"""

from collections.abc import Mapping

import jinja2

from kvcore.errors import InvalidRequestError
from router.requests.spec import ChatPrompt
from router.text.message_content import as_parts_or_text, as_system_messages, template_reads_parts
from router.text.template_sandbox import StepBudget, TemplateEnvironment, TemplateTooBigError, limited_steps

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CUT_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Put behind the message to continue: the prompt ends where the template has put it. Its blank says whether the
template has trimmed the message."""
STEPS, MAX_STEPS = 200_000, 20_000_000
"""Of one rendering: a second's work. Real templates take a hundred for a message and a few hundred for a tool; for many
messages there are more, as some templates look from each at all others."""


class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, steps: int = STEPS) -> None:
        """Raises ValueError where the text is no template."""
        environment = TemplateEnvironment()
        try:
            self._template = environment.from_string(source)
            self._reads_parts = template_reads_parts(environment.parse(source))
        except (jinja2.TemplateError, SyntaxError, RecursionError, ValueError) as error:
            # Python's own errors: what jinja makes of a template can be nested too deeply for it.
            raise ValueError(str(error)) from error
        self._special_tokens, self._steps = special_tokens, steps
        self._knows_developers = '"developer"' in source or "'developer'" in source

    def __repr__(self) -> str:
        return f"<ChatTemplate with {self._special_tokens}>"

    def render(self, chat: ChatPrompt) -> str:
        """The prompt. Raises InvalidRequestError with the template's own words where it refuses the messages."""
        messages = [self._message(message) for message in chat.messages]
        if not self._knows_developers:
            messages = as_system_messages(messages)
        last = _mark_end(messages[-1]) if chat.continue_final_message else ""
        values = {
            **self._special_tokens,
            **chat.template_values,
            "messages": messages,
            "tools": chat.tools,
            "documents": chat.documents,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        with limited_steps(min(self._steps + len(messages) ** 2, MAX_STEPS)) as budget:
            text = self._run(values, budget)
        return _cut_at_mark(text, last) if chat.continue_final_message else text

    def _run(self, values: Mapping[str, object], budget: StepBudget) -> str:
        pieces: list[str] = []
        try:
            for piece in self._template.generate(values):
                budget.spend_text(piece)
                pieces.append(piece)
        except TemplateTooBigError as error:
            reason = f"the model's chat template does too much for these messages: {error}"
            raise InvalidRequestError(reason, param="messages") from error
        except Exception as error:  # a template is a program that came with the model
            reason = f"the model's chat template refused it: {error}"
            raise InvalidRequestError(reason, param="messages") from error
        return "".join(pieces)

    def _message(self, message: Mapping[str, object]) -> dict[str, object]:
        seen = {**message, "content": as_parts_or_text(message, parts=self._reads_parts)}
        # gpt-oss reads reasoning by this name. A template that writes whole messages out shows it first.
        return {"thinking": seen["reasoning"], **seen} if "reasoning" in seen else seen


class ChatTemplates:
    """Those of one model: mostly one, called `default`. One that cannot be used costs the chats that need it."""

    def __init__(self, sources: Mapping[str, str], settings: Mapping[str, object]) -> None:
        """`settings`: of tokenizer_config.json, for the special tokens."""
        self._templates: dict[str, ChatTemplate | str] = {}
        self.source = "\n".join(sources.values())
        """The text of all of them."""
        special_tokens = special_tokens_of(settings)
        for name, source in sources.items():
            try:
                self._templates[name] = ChatTemplate(source, special_tokens)
            except ValueError as error:
                self._templates[name] = f"the chat template {name!r} cannot be read ({error})"

    def __repr__(self) -> str:
        return f"<ChatTemplates {self._templates}>"

    @property
    def problem(self) -> str | None:
        """Why chats without tools cannot be served; None: they can."""
        chosen = self._choose(has_tools=False)
        return chosen if isinstance(chosen, str) else None

    def render(self, chat: ChatPrompt) -> str:
        """See ChatTemplate. By the template that transformers would choose: with tools `tool_use`, if there is one."""
        chosen = self._choose(has_tools=chat.tools is not None)
        if isinstance(chosen, str):
            raise no_chat(chosen)
        return chosen.render(chat)

    def _choose(self, *, has_tools: bool) -> ChatTemplate | str:
        for name in ("tool_use", "default") if has_tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        others = ", ".join(sorted(self._templates))
        return f"no chat template 'default', only {others}" if others else "no chat template"


def no_chat(problem: str) -> InvalidRequestError:
    """What a chat is answered that has no template to be rendered by."""
    return InvalidRequestError(f"this model serves no such chat: {problem}; use /v1/completions", param="messages")


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
