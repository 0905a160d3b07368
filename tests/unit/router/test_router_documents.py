"""Documents that clients name: the prompt's text and tokens, and where in them documents stand."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.small_tokenizers import byte_fallback, byte_level, metaspace
from tokenizers.processors import TemplateProcessing

from kvcore.errors import InvalidRequestError
from nodeapi.documents import MAX_DOCUMENTS
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.openai_schema import prompts_of
from router.api.limits import ApiLimits
from router.documents.named import NamedDocuments
from router.documents.reading import PromptReader
from router.requests.spec import Prompt
from router.text.tokenizer import ByteTokenizer, FolderTokenizer, Tokenizer

SEPARATOR = " # # "
TEMPLATES = sorted((Path(__file__).parents[2] / "support" / "chat_templates").glob("*.jinja"))
BYTES = ByteTokenizer(512)
SYSTEM, ASK = {"role": "system", "content": "be brief"}, {"role": "user", "content": "what is it?"}
FIRST, SECOND = "Ferries carry trains.", "  Trains carry\n\nferries. "


def prompt(kind: type = ChatRequest, **fields: Any) -> Prompt:
    if kind is ChatRequest:
        fields.setdefault("messages", [SYSTEM, ASK])
    (made,) = prompts_of(json_like(kind, fields), ApiLimits())
    return made


def json_like(kind: type, fields: dict[str, Any]) -> Any:
    return msgspec.json.decode(json.dumps(fields), type=kind)


def seen(
    asked: Prompt, tokenizer: Tokenizer = BYTES, separator: str | None = None
) -> tuple[str, list[str], NamedDocuments]:
    """The prompt's text, the texts of its documents, and what was named."""
    reader = PromptReader(tokenizer, separator)
    read = reader.tokens(asked, "")
    named = read.documents
    assert named is not None
    assert not named.spans or (named.told is not None and named.told.problem(len(read.token_ids)) is None)
    texts = [tokenizer.decode(read.token_ids[start:stop]) for start, stop in named.spans]
    return reader.text(asked), texts, named  # type: ignore[arg-type]


def folder(path: Path, tokenizer: Any, template: str) -> FolderTokenizer:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"})
    )
    return FolderTokenizer(path)


def test_documents_come_before_the_last_users_text_with_the_title_first() -> None:
    earlier = [SYSTEM, ASK, {"role": "assistant", "content": "hm"}, {"role": "user", "content": "and?"}]
    asked = prompt(messages=earlier, documents=[FIRST, {"text": SECOND, "title": "Trains"}])
    text, texts, named = seen(asked)
    assert text.endswith(f"<user>{FIRST}\n\nTrains\n{SECOND}\n\nand?\n<assistant>")
    assert texts == [FIRST, f"Trains\n{SECOND.rstrip()}"]
    assert named.kind == "field"
    assert text.encode()[: named.header].decode().endswith("<user>"), (
        "behind the system prompt, whatever was said since"
    )
    assert "hm" not in text[: named.header]


def test_a_document_at_the_beginning_of_the_first_question_stands_right_behind_the_header() -> None:
    _, _, named = seen(prompt(documents=[FIRST, SECOND]))
    assert named.spans[0][0] == named.header


def test_parts_of_a_message_are_documents_where_they_say_so() -> None:
    parts = [
        {"type": "text", "text": FIRST, "document": True},
        "between",
        {"type": "text", "text": "q", "document": False},
    ]
    text, texts, named = seen(prompt(messages=[SYSTEM, {"role": "user", "content": parts}]))
    assert texts == [FIRST] and named.kind == "part"
    assert text.endswith(f"<user>{FIRST}\nbetween\nq\n<assistant>")


def test_a_document_within_the_system_prompt_ends_the_header() -> None:
    system = {"role": "system", "content": ["rules", {"type": "text", "text": FIRST, "document": True}]}
    text, texts, named = seen(prompt(messages=[system, ASK]))
    assert texts == [FIRST] and text[: named.header] == "<system>rules\n"


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one # # two", []),
        ("head # # one # # q", ["one"]),
        (" # # one # # two # # ", ["one", "two"]),
        ("head # #  # # one # # q", ["one"]),
        ("no separator", []),
        ("a # # b # # c # # b # # d", ["b", "c", "b"]),
    ],
)
def test_what_stands_between_two_separators_is_a_document(text: str, documents: list[str]) -> None:
    for asked in (prompt(CompletionRequest, prompt=text), prompt(messages=[{"role": "user", "content": text}])):
        if not documents:
            assert PromptReader(BYTES, SEPARATOR).tokens(asked, "").documents is None
            continue
        whole, texts, named = seen(asked, separator=SEPARATOR)
        assert texts == documents and named.kind == "separator" and text in whole
        assert PromptReader(BYTES).tokens(asked, "").documents is None, "none is configured"


def test_a_completions_documents_come_before_its_prompt() -> None:
    text, texts, named = seen(prompt(CompletionRequest, prompt="q", documents=[FIRST, {"text": SECOND}]))
    assert text == f"{FIRST}\n\n{SECOND}\n\nq" and texts == [FIRST, SECOND.strip()] and named.header == 0


@pytest.mark.parametrize(
    ("template", "make"),
    [*((path, byte_level) for path in TEMPLATES), (TEMPLATES[-1], byte_fallback), (TEMPLATES[-1], metaspace)],
    ids=lambda value: getattr(value, "stem", None) or value.__name__,
)
def test_a_document_has_the_same_tokens_wherever_it_stands(tmp_path: Path, template: Path, make: Any) -> None:
    tokenizer = folder(tmp_path, make(), template.read_text())
    texts = ["the the re", "re the", "the"]
    found: dict[str, set[tuple[int, ...]]] = {}
    headers = set()
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2], [0, 0]):
        named = [{"doc_id": at, "text": texts[at]} for at in order]
        read = PromptReader(tokenizer).tokens(prompt(messages=[ASK], documents=named), "")
        assert read.documents is not None and not read.documents.why and len(read.documents.spans) == len(order)
        headers.add(tuple(read.token_ids[: read.documents.header]))
        for at, (start, stop) in zip(order, read.documents.spans, strict=True):
            found.setdefault(texts[at], set()).add(tuple(read.token_ids[start:stop]))
    assert all(len(tokens) == 1 for tokens in found.values()) and len(found) == 3
    assert len(headers) == 1 or template.stem in ("granite",), (
        "the header is the same, but where a name of one is in it"
    )


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_the_text_is_what_the_template_makes_without_marks(tmp_path: Path, template: Path) -> None:
    tokenizer = folder(tmp_path, byte_level(), template.read_text())
    marked = {"role": "user", "content": [{"type": "text", "text": FIRST, "document": True}, "q?"]}
    plain = {"role": "user", "content": [{"type": "text", "text": FIRST}, "q?"]}
    reader = PromptReader(tokenizer)
    asked, same = prompt(messages=[marked]), prompt(messages=[plain])
    assert reader.text(asked) == reader.text(same)  # type: ignore[arg-type]
    read = reader.tokens(asked, "")
    assert tokenizer.decode(read.token_ids, skip_special_tokens=False) == reader.text(same)  # type: ignore[arg-type]


def test_a_template_that_writes_documents_has_them_and_one_that_names_them_alone_has_not(tmp_path: Path) -> None:
    writes = "{% for d in documents %}[{{ d.text }}]{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    text, texts, _ = seen(prompt(documents=[FIRST, SECOND]), folder(tmp_path / "a", byte_level(), writes))
    assert text == f"[{FIRST}][{SECOND}]be briefwhat is it?" and texts == [FIRST, SECOND.strip()]
    names = "{{ (documents or []) | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text, texts, _ = seen(prompt(documents=[FIRST]), folder(tmp_path / "b", byte_level(), names))
    assert text == f"0be brief{FIRST}\n\nwhat is it?" and texts == [FIRST]


def test_special_tokens_go_around_the_whole_and_not_around_each_document(tmp_path: Path) -> None:
    made = byte_level()
    begin, end = made.token_to_id("<s>"), made.token_to_id("<|end|>")
    made.post_processor = TemplateProcessing(single="<s> $A <|end|>", special_tokens=[("<s>", begin), ("<|end|>", end)])
    tokenizer = folder(tmp_path, made, "{{ messages }}")
    read = PromptReader(tokenizer).tokens(prompt(CompletionRequest, prompt="q", documents=[FIRST, FIRST]), "")
    assert [at for at, token in enumerate(read.token_ids) if token in (begin, end)] == [0, len(read.token_ids) - 1]
    assert read.documents is not None and read.documents.header == 1


@pytest.mark.parametrize("template", ["{{ messages[0].content[:4] }}", "{{ messages[0].content | length }}"])
def test_where_the_template_changes_a_document_nothing_is_reused(tmp_path: Path, template: str) -> None:
    tokenizer = folder(tmp_path, byte_level(), template)
    parts = [{"type": "text", "text": FIRST, "document": True}]
    read = PromptReader(tokenizer).tokens(prompt(messages=[{"role": "user", "content": parts}]), "")
    assert read.documents is not None and "template" in read.documents.why and not read.documents.spans
    plain = PromptReader(tokenizer).tokens(prompt(messages=[{"role": "user", "content": FIRST}]), "")
    assert read.token_ids == plain.token_ids


@pytest.mark.parametrize("odd", ["\U0010fff0", "\U0010fff1", "\U0010fff2", "\U0010fff0x\U0010fff1"])
def test_a_client_cannot_move_a_span_by_the_characters_that_mark_one(odd: str) -> None:
    for where in ("before", "within", "behind"):
        parts = [
            "a" + odd * (where == "before"),
            {"type": "text", "text": "doc" + odd * (where == "within") + "ument", "document": True},
            odd * (where == "behind") + "b",
        ]
        asked = prompt(messages=[{"role": "user", "content": parts}])
        read = PromptReader(BYTES).tokens(asked, "")
        assert bytes(read.token_ids).decode() == PromptReader(BYTES).text(asked)  # type: ignore[arg-type]
        assert read.documents is not None
        for start, stop in read.documents.spans:
            assert bytes(read.token_ids[start:stop]).decode() in ("document", f"doc{odd}ument")


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (ChatRequest, {"documents": [{"title": "t"}, "text"]}, "documents"),
        (ChatRequest, {"documents": ["text"], "messages": [SYSTEM]}, "documents"),
        (CompletionRequest, {"prompt": "q", "documents": [{"title": "t"}]}, "documents"),
        (CompletionRequest, {"prompt": "q", "documents": [""]}, "documents"),
        (CompletionRequest, {"prompt": [1, 2], "documents": ["d"]}, "documents"),
        (CompletionRequest, {"prompt": [[1, 2]], "documents": ["d"]}, "documents"),
        (ChatRequest, {"documents": ["d"] * (MAX_DOCUMENTS + 1)}, "documents"),
        (CompletionRequest, {"prompt": SEPARATOR.join(["d"] * (MAX_DOCUMENTS + 3))}, "prompt"),
    ],
)
def test_what_cannot_be_placed_is_refused_by_name(kind: type, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PromptReader(BYTES, SEPARATOR).tokens(prompt(kind, **fields), "")
    assert caught.value.param == param


@pytest.mark.parametrize("documents", [None, [], [{"title": "no text"}]])
def test_a_chat_without_texts_of_documents_is_as_it_was(documents: Any) -> None:
    read = PromptReader(BYTES, SEPARATOR).tokens(prompt(documents=documents), "")
    assert read.documents is None and read.token_ids == BYTES.encode(BYTES.render_chat(prompt()))  # type: ignore[arg-type]


def test_blank_documents_are_no_documents() -> None:
    read = PromptReader(BYTES).tokens(prompt(documents=[" \n ", "d"]), "")
    assert read.documents is not None and len(read.documents.spans) == 1
