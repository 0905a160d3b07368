"""Templates in the style of real models render as transformers renders them, of what vLLM's server hands over."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import InvalidRequestError
from router.api.body import parse
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.openai_schema import prompts_of
from router.api.limits import ApiLimits
from router.requests.spec import ChatPrompt
from router.text.message_content import template_reads_parts
from router.text.template_sandbox import TemplateEnvironment
from router.text.tokenizer import FolderTokenizer
from tests.support.conversations import READ_PARTS, SEEN, SENT, TEMPLATES, WAYS
from tests.support.small_tokenizers import byte_level, saved

KNOWS_DEVELOPERS = {"gpt_oss"}


def ours(tokenizer: FolderTokenizer, messages: list[dict[str, Any]], way: dict[str, Any]) -> str | None:
    body = parse(json.dumps({"model": "m", "messages": messages, **way}).encode(), ChatRequest)
    (prompt,) = prompts_of(body, ApiLimits())
    assert isinstance(prompt, ChatPrompt)
    try:
        return tokenizer.render_chat(prompt)
    except InvalidRequestError:
        return None


def theirs(template: str, messages: list[dict[str, Any]], way: dict[str, Any]) -> str | None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    values: dict[str, Any] = {"bos_token": "<s>", "eos_token": "<|end|>", "add_generation_prompt": True}
    values |= {name: value for name, value in way.items() if name not in ("tool_choice", "chat_template_kwargs")}
    values |= way.get("chat_template_kwargs", {})
    if way.get("continue_final_message"):
        values["add_generation_prompt"] = False
    if "reasoning_effort" in way:
        values["enable_thinking"] = True
    try:
        rendered, _ = render(conversations=[messages], chat_template=template, **values)
    except Exception:
        return None
    return str(rendered[0])


def handed_over(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In parts where the template reads them, and developers as the system where it knows none."""
    if name not in KNOWS_DEVELOPERS:
        messages = [{**m, "role": "system" if m["role"] == "developer" else m["role"]} for m in messages]
    if name not in READ_PARTS:
        return messages
    seen: list[dict[str, Any]] = []
    for message in messages:
        parts = [{"type": "text", "text": text} for text in message["content"].split("\n", 2)]
        if message["role"] == "tool":
            parts = message["content"]
        elif message["content"] != "rain\nbow\n{{ x }}":
            parts = [{"type": "text", "text": message["content"]}]
        seen.append({**message, "content": parts})
    return seen


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_render_as_transformers_does(tmp_path: Path, name: str) -> None:
    (saved(byte_level(), tmp_path) / "chat_template.jinja").write_text(TEMPLATES[name])
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "<|end|>"}}')
    tokenizer = FolderTokenizer(tmp_path)
    rendered = 0
    for subject, sent in SENT.items():
        seen = handed_over(name, SEEN[subject])
        for way in WAYS:
            prompt = ours(tokenizer, sent, way)
            assert prompt == theirs(TEMPLATES[name], seen, way), (subject, way)
            rendered += prompt is not None
    assert rendered > len(SENT) * len(WAYS) // 3, "most conversations are none that the template refuses"


MACRO = "{% macro f(x, n=1) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}"
OF_CONTENT = "{% macro f(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}"
RENAMED = "{% set content = m.content %}"


@pytest.mark.parametrize(
    ("before", "inside", "parts"),
    [
        (MACRO, "{{ f(m.content) }}", True),
        (MACRO, "{{ f(n=2, x=m['content']) }}", True),
        (MACRO, "{{ f(m.role, m.content) }}", False),
        (OF_CONTENT, "{{ f(m.content | list) }}", True),
        (OF_CONTENT, "{{ f(tools) }}", False),
        ("", RENAMED + "{% for c in content %}{{ c }}{% endfor %}", True),
        ("", RENAMED + "{% for c in content | list %}{{ c }}{% endfor %}", False),
        ("", "{% for c in m.content[1:] %}{{ c }}{% endfor %}", True),
        ("", "{% for c in m.tool_calls %}{{ c }}{% endfor %}", False),
    ],
)
def test_a_template_reads_parts_where_vllm_says_so(before: str, inside: str, parts: bool) -> None:
    source = before + "{% for m in messages %}" + inside + "{% endfor %}"
    assert template_reads_parts(TemplateEnvironment().parse(source)) is parts
