"""Chat templates render as transformers renders them, of messages in the form that vLLM's server hands over."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.router_fakes import make_rig
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors

from kvcore.errors import InvalidRequestError
from kvferry.doctor import checks
from router.api.body import parse
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.openai_schema import prompts_of
from router.api.limits import ApiLimits
from router.requests.spec import ChatPrompt, TextPrompt
from router.text.tokenizer import ByteTokenizer, FolderTokenizer

TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
CHATML = """{%- for m in messages %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
NAMES = """{% for m in messages %}{{ m.role }}{% if m.name is defined %} ({{ m.name }}){% endif %}: {{ m.content }}
{% endfor %}"""
THINKING = """{%- set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}
{% set ns.last = loop.index0 %}
{% endif %}{% endfor %}
{%- for m in messages %}[{{ m.role }}]{% if m.reasoning_content is string and loop.index0 > ns.last %}<think>
{{ m.reasoning_content.strip('\\n') }}</think>{% endif %}{{ m.content.split('</think>')[-1].lstrip() }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and enable_thinking is false %}
<think></think>{% endif %}{% endif %}"""
OLD_THINKING = """{% for m in messages %}{{ m.thinking or '' }}|{{ m.content }};{% endfor %}
{{ reasoning_effort | default('medium') }}"""
DATED = "Today: {{ strftime_now('%Y-%m-%d') }}{% if strftime_now is defined %}!{% endif %}" + CHATML
MARKED = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}
{{ m.content }}{{ eos_token }}
{% endgeneration %}{{ x is defined }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"""
JSON = """{# of each message the content, too #}
{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 'é<&>', 'a': 1} | tojson(sort_keys=true) }}
{{ messages | tojson(separators=(',', ':'), ensure_ascii=true) }}{{ [1, 2] | tojson(false, 1) }}"""
SPECIAL = """{{ bos_token }}{{ eos_token }}{% if pad_token is defined %}{{ pad_token }}{% else %}none{% endif %}
{{ sep_token }}
{% if unk_token is not defined %}no unk{% endif %}{{ tools is none }}{{ documents }}"""
STRICT = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set offset = 1 %}{% else %}
{% set offset = 0 %}{% endif %}
{% for m in messages[offset:] %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content | trim }}{% if loop.last %}{% break %}{% endif %}
{% endfor %}"""
SEEING = """{% for m in messages %}{{ m.role }}:{% for part in m['content'] %}{% if part.type == 'text' %}
{{ part.text }}{% else %}<image>{% endif %}{% endfor %}
{% endfor %}"""
SEEING_MACRO = """{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for item in content %}
<{{ item.text }}>{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}"""
SHAPES = [CHATML, TRIMMED, NAMES, THINKING, OLD_THINKING, DATED, MARKED, JSON, SPECIAL, STRICT]
SEEING_RENAMED = """{% set all = messages %}{% for m in all[1:] %}
{% for c in m.content | list %}{{ c.text }}{% endfor %}
{% endfor %}"""
SEEING_SHAPES = [SEEING, SEEING_MACRO, SEEING_RENAMED]
RECURSIVE = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
ECHO_PARTS = "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}"
REASONED = {"role": "assistant", "content": "</think>4 ", "reasoning": "2+2\n", "reasoning_content": "2+2\n"}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi é<&>\n"}],
    [{"role": "system", "content": " s "}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "One, "}],
    [{"role": "user", "content": "2+2?", "name": "robert"}, REASONED],
    [{"role": "assistant", "content": "x"}, {"role": "user", "content": "{{ y }} <|im_end|>"}],
]
WAYS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"add_generation_prompt": True, "enable_thinking": False, "reasoning_effort": "high", "bos_token": "<own>"},
]


def folder(tmp_path: Path, template: object) -> Path:
    words = FastTokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "hi": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.save(str(tmp_path / "tokenizer.json"))
    start = {"__type": "AddedToken", "content": "<s>", "special": True}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return tmp_path


def asked(messages: list[dict[str, Any]], **fields: Any) -> ChatPrompt:
    """Through the fields of a request, as a client sends it."""
    body = parse(json.dumps({"model": "m", "messages": messages, **fields}).encode(), ChatRequest)
    (prompt,) = prompts_of(body, ApiLimits())
    assert isinstance(prompt, ChatPrompt)
    return prompt


def through_the_api(tokenizer: FolderTokenizer, messages: list[dict[str, Any]], way: dict[str, Any]) -> str | None:
    own = {name: way[name] for name in way if name in ("add_generation_prompt", "continue_final_message")}
    try:
        return tokenizer.render_chat(
            asked(messages, **own, chat_template_kwargs={name: way[name] for name in way if name not in own})
        )
    except InvalidRequestError:
        return None


def by_transformers(template: str, messages: list[dict[str, Any]], way: dict[str, Any]) -> str | None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    values = {"bos_token": "<s>", "eos_token": "</s>", **way}
    try:
        rendered, _ = render(conversations=[messages], chat_template=template, **values)
    except Exception:
        return None
    return str(rendered[0])


@pytest.mark.parametrize("template", SHAPES)
def test_chat_templates_render_as_transformers_does(tmp_path: Path, template: str) -> None:
    tokenizer = FolderTokenizer(folder(tmp_path, template))
    for messages in CHATS:
        for way in WAYS:
            assert through_the_api(tokenizer, messages, way) == by_transformers(template, messages, way), way


@pytest.mark.parametrize("template", SEEING_SHAPES)
def test_a_template_that_loops_over_content_gets_parts(tmp_path: Path, template: str) -> None:
    tokenizer = FolderTokenizer(folder(tmp_path, template))
    for messages in CHATS:
        in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        for way in WAYS:
            expected = by_transformers(template, in_parts, way)
            assert through_the_api(tokenizer, messages, way) == through_the_api(tokenizer, in_parts, way) == expected


def test_a_folder_renders_as_the_tokenizer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": SPECIAL + CHATML}])
    theirs = transformers.AutoTokenizer.from_pretrained(str(path))
    for messages in CHATS:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert FolderTokenizer(path).render_chat(asked(messages)) == expected


def test_text_parts_are_joined_by_a_newline(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": text} for text in ("rain", "bow")]
    for tokenizer in (FolderTokenizer(folder(tmp_path, CHATML)), ByteTokenizer(256)):
        as_parts = tokenizer.render_chat(asked([{"role": "user", "content": parts}]))
        assert as_parts == tokenizer.render_chat(asked([{"role": "user", "content": "rain\nbow"}]))


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_reaches_every_name_that_templates_know(tmp_path: Path, field: str) -> None:
    template = "{% for m in messages %}{{ m.reasoning }}{{ m.reasoning_content }}{{ m.thinking }}.{% endfor %}"
    messages = [{"role": role, "content": "c", field: "r"} for role in ("assistant", "user")]
    assert FolderTokenizer(folder(tmp_path, template)).render_chat(asked(messages)) == "rrr.."


def test_fields_of_the_request_reach_the_template(tmp_path: Path) -> None:
    template = "{{ reasoning_effort }} {{ documents[0].text }} {{ add_generation_prompt }}"
    tokenizer = FolderTokenizer(folder(tmp_path, template))
    fields = {"reasoning_effort": "low", "documents": [{"text": "d"}], "chat_template_kwargs": {"reasoning_effort": ""}}
    assert tokenizer.render_chat(asked(CHATS[0], **fields)) == "low d True"
    assert asked(CHATS[0], continue_final_message=True).add_generation_prompt is False
    same = {"add_generation_prompt": True, "continue_final_message": False, "documents": [{"text": "e"}]}
    assert tokenizer.render_chat(asked(CHATS[0], chat_template_kwargs={**same, "reasoning_effort": 1})) == "1 e True"


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({}, "unset"),
        ({"reasoning_effort": "high"}, "True"),
        ({"reasoning_effort": "none"}, "False"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, "False"),
    ],
)
def test_effort_is_thinking_unless_the_client_says_otherwise(tmp_path: Path, fields: dict[str, Any], seen: str) -> None:
    tokenizer = FolderTokenizer(folder(tmp_path, "{{ enable_thinking | default('unset') }}"))
    assert tokenizer.render_chat(asked(CHATS[0], **fields)) == seen


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs.add_generation_prompt"),
        ({"chat_template_kwargs": {"documents": ["d"]}}, "chat_template_kwargs.documents"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_what_a_template_may_not_be_given_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        asked(CHATS[0], **fields)
    assert caught.value.param == param


@pytest.mark.parametrize("template", ["no messages", ECHO_PARTS])
def test_a_message_that_cannot_be_continued_is_refused(tmp_path: Path, template: str) -> None:
    tokenizer = FolderTokenizer(folder(tmp_path, template))
    with pytest.raises(InvalidRequestError, match="continue_final_message") as caught:
        tokenizer.render_chat(asked([{"role": "user", "content": []}], continue_final_message=True))
    assert caught.value.param == "continue_final_message"


BROKEN = ["{% for %}", "{% unknown_tag %}", "{{ x | no_such_filter }}", "{% if x %}" * 200 + "{% endif %}" * 200]


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_cannot_be_read_costs_chats_alone(tmp_path: Path, template: str) -> None:
    tokenizer = FolderTokenizer(folder(tmp_path, template))
    assert tokenizer.encode("hi") == [1, 2] and "cannot be read" in repr(tokenizer)
    with pytest.raises(InvalidRequestError, match=r"template 'default' cannot be read .*use /v1/compl") as caught:
        tokenizer.render_chat(asked(CHATS[0]))
    assert caught.value.param == "messages"
    finding = checks._check_tokenizer(tmp_path)
    assert finding.ok and "cannot be read" in finding.detail


NAMED = {"default": "one", "tool_use": "two", "rag": "three"}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}


@pytest.mark.parametrize("form", ["list", "object", "files", "files beside settings"])
def test_of_several_templates_the_one_that_transformers_would_choose(tmp_path: Path, form: str) -> None:
    in_settings: object = [{"name": name, "template": text} for name, text in NAMED.items()]
    if form == "object":
        in_settings = NAMED
    elif form.startswith("files"):
        in_settings = "another" if "beside" in form else None
        (tmp_path / "chat_template.jinja").write_text(NAMED["default"])
        (tmp_path / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(NAMED[name])
    path = folder(tmp_path, in_settings)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(path))
    for fields, expected in (({}, "one"), (TOOLS, "two")):
        assert FolderTokenizer(path).render_chat(asked(CHATS[0], **fields)) == expected
        assert theirs.get_chat_template(tools=fields.get("tools")) == expected  # type: ignore[attr-defined]


def test_of_several_templates_one_that_cannot_be_read_costs_the_chats_that_need_it(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer(folder(tmp_path, {"default": "one", "tool_use": "{% for %}"}))
    assert tokenizer.render_chat(asked(CHATS[0])) == "one" and tokenizer.chat_problem is None
    with pytest.raises(InvalidRequestError, match="template 'tool_use' cannot be read"):
        tokenizer.render_chat(asked(CHATS[0], **TOOLS))


def test_several_templates_of_which_none_is_for_all_are_named(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer(folder(tmp_path, {"tool_use": "two", "rag": "three"}))
    assert tokenizer.render_chat(asked(CHATS[0], **TOOLS)) == "two"
    with pytest.raises(InvalidRequestError, match="no chat template 'default', only rag, tool_use; use"):
        tokenizer.render_chat(asked(CHATS[0]))


def test_a_processors_template_counts_where_there_is_no_other(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "the processor's"}))
    assert FolderTokenizer(folder(tmp_path, None)).render_chat(asked(CHATS[0])) == "the processor's"
    assert FolderTokenizer(folder(tmp_path, "own")).render_chat(asked(CHATS[0])) == "own"


@pytest.mark.parametrize(
    ("template", "roles", "seen"),
    [
        (NAMES, "developer user", "system: 0\nuser: 1\n"),
        (NAMES, "system developer user developer", "system: 0\n\n1\n\n3\nuser: 2\n"),
        (NAMES, "user system", "user: 0\nsystem: 1\n"),
        (NAMES + "{# a 'developer' #}", "system developer", "system: 0\ndeveloper: 1\n"),
    ],
)
def test_developers_are_the_system_for_templates_that_know_none(
    tmp_path: Path, template: str, roles: str, seen: str
) -> None:
    messages = [{"role": role, "content": str(number)} for number, role in enumerate(roles.split())]
    assert FolderTokenizer(folder(tmp_path, template)).render_chat(asked(messages)) == seen


async def test_a_template_that_cannot_be_read_leaves_completions_as_they_are(tmp_path: Path) -> None:
    rig = await make_rig(tokenizer=FolderTokenizer(folder(tmp_path, "{% for %}")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as http:  # type: ignore[arg-type]
        body = {"model": "fake-model", "max_tokens": 2}
        chat = await http.post("/v1/chat/completions", json={**body, "messages": CHATS[0]})
        error = chat.json()["error"]
        assert (chat.status_code, error["param"]) == (400, "messages")
        assert "template 'default' cannot be read" in error["message"]
        assert (await http.post("/v1/completions", json={**body, "prompt": "hi"})).status_code == 200
        assert (await http.get("/health")).status_code == 200


def test_all_that_a_message_may_have_reaches_the_template(tmp_path: Path) -> None:
    kinds = {"refusal": "refusal", "thinking": "thinking", "output_text": "text"}
    parts = [{"type": kind, field: kind[:2]} for kind, field in kinds.items()]
    developer = {"role": "developer", "content": "d", "task": "t", "tools": [{"type": "function"}]}
    messages = [{"role": "assistant", "content": parts}, developer, {"role": "function", "name": "f", "content": "x"}]
    shown = FolderTokenizer(folder(tmp_path, "{# 'developer' #}{{ messages | tojson }}")).render_chat(asked(messages))
    assert json.loads(shown) == [{"role": "assistant", "content": "re\nth\nou"}, *messages[1:]]


def test_a_template_file_in_no_encoding_costs_chats_alone(tmp_path: Path) -> None:
    (folder(tmp_path, CHATML) / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequestError, match="chat template cannot be read"):
        FolderTokenizer(tmp_path).render_chat(asked(CHATS[0]))


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", RECURSIVE])
def test_a_template_that_fails_is_the_requests_400(tmp_path: Path, template: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat template refused it"):
        FolderTokenizer(folder(tmp_path, template)).render_chat(asked(CHATS[0]))


def test_special_tokens_of_the_map_file_count_where_the_settings_have_none(tmp_path: Path) -> None:
    path = folder(tmp_path, "{{ bos_token }}{{ cls_token }}")
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "other", "cls_token": {"content": "<cls>"}}))
    assert FolderTokenizer(path).render_chat(asked(CHATS[0])) == "<s><cls>"


def test_a_client_may_do_without_special_tokens_or_ask_for_them() -> None:
    assert asked(CHATS[0]).add_special_tokens is False and asked(CHATS[0], add_special_tokens=True).add_special_tokens
    raw = b'{"model": "m", "prompt": ["a"], "add_special_tokens": false}'
    assert prompts_of(parse(raw, CompletionRequest), ApiLimits()) == [TextPrompt("a", add_special_tokens=False)]


def test_the_simulated_engines_chats_end_as_they_are_asked_to() -> None:
    tokenizer = ByteTokenizer(256)
    ends = [{}, {"add_generation_prompt": False}, {"continue_final_message": True}]
    shown = [tokenizer.render_chat(asked([{"role": "user", "content": "a"}], **end)) for end in ends]
    assert shown == ["<user>a\n<assistant>", "<user>a\n", "<user>a"]
