"""`response_format` and `structured_outputs`: what is asked of the nodes, and what is refused by which name."""

import json

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from support.router_fakes import VOCAB, Rig, make_rig, two_and_two

from kvcore.errors import ContextLengthError, InvalidRequestError
from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.grammars.matcher import GrammarMatcher
from router.requests.records import RequestLog
from router.tenants.callers import Caller, set_caller
from router.text.grammar_checks import GrammarChecks
from router.text.reasoning_marks import ReasoningMarks
from router.text.tokenizer import ByteTokenizer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OBJECT = '{"type": "object"}'
TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}
STRUCTURES = [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]
OLD_TAG = {"type": "structural_tag", "structures": STRUCTURES, "triggers": ["<f"]}


def json_schema(**fields: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **fields}}}


def grammar(kind: GrammarKind, text: object, **fields: object) -> Grammar:
    text = text if isinstance(text, str) else json.dumps(text)
    return Grammar(kind=kind, text=text, **fields)  # type: ignore[arg-type]


async def ask(rig: Rig, body: dict[str, object], path: str = "completions") -> httpx.Response:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    asked: dict[str, object] = {
        "completions": {"prompt": "a", "max_tokens": 4},
        "chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
        "responses": {"input": "a"},
    }[path]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        return await http.post(f"/v1/{path}", json={**asked, **body})


GOOD: list[tuple[dict[str, object], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, grammar(GrammarKind.JSON, OBJECT)),
    (json_schema(), grammar(GrammarKind.JSON, SCHEMA)),
    (json_schema(strict=True, description="d"), grammar(GrammarKind.JSON, SCHEMA)),
    (json_schema(strict=False), grammar(GrammarKind.JSON, SCHEMA)),
    ({"response_format": TAG}, grammar(GrammarKind.STRUCTURAL_TAG, TAG)),
    ({"response_format": OLD_TAG}, grammar(GrammarKind.STRUCTURAL_TAG, OLD_TAG)),
    ({"structured_outputs": {"json": SCHEMA}}, grammar(GrammarKind.JSON, SCHEMA)),
    ({"structured_outputs": {"json": OBJECT}}, grammar(GrammarKind.JSON, OBJECT)),
    ({"structured_outputs": {"json_object": True}}, grammar(GrammarKind.JSON, OBJECT)),
    ({"structured_outputs": {"regex": "[0-9]+"}}, grammar(GrammarKind.REGEX, "[0-9]+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, grammar(GrammarKind.CHOICE, ["a", "b"])),
    ({"structured_outputs": {"grammar": 'root ::= "x"'}}, grammar(GrammarKind.GRAMMAR, 'root ::= "x"')),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, grammar(GrammarKind.STRUCTURAL_TAG, TAG)),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        grammar(GrammarKind.JSON, SCHEMA, whitespace=""),
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}},
        grammar(GrammarKind.JSON, SCHEMA, whitespace=" ?"),
    ),
    (
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_additional_properties": True}},
        grammar(GrammarKind.JSON, SCHEMA | {"additionalProperties": False}),
    ),
    ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, grammar(GrammarKind.REGEX, "a")),
    ({"response_format": None, "structured_outputs": None}, None),
]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(("body", "wanted"), GOOD)
async def test_the_nodes_are_told_of_the_form(body: dict[str, object], wanted: Grammar | None, path: str) -> None:
    rig = await make_rig()
    reply = await ask(rig, body, path)
    assert reply.status_code == 200, reply.text
    (sent,) = [request for node in rig.nodes.nodes for request in node.generates]
    assert sent.sampling.grammar == wanted


BAD: list[tuple[dict[str, object], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    (json_schema(name=None), "response_format.json_schema.name", "text"),
    (json_schema(schema=None), "response_format.json_schema.schema", "object"),
    (json_schema(strict="yes"), "response_format.json_schema.strict", "true or false"),
    (json_schema(schema={"type": "nothing"}), "response_format.json_schema.schema", "Invalid type"),
    (json_schema(schema={"not": {}}), "response_format.json_schema.schema", "not"),
    (json_schema(schema={"$ref": "#"}), "response_format.json_schema.schema", "no text can follow"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.format", "is missing"),
    ({"structured_outputs": {}}, "structured_outputs", "has one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "has one of"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", "true"),
    ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex", "unclosed"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "one text or more"),
    ({"structured_outputs": {"grammar": " "}}, "structured_outputs.grammar", "empty"),
    ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar", "Expected"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "no JSON schema"),
    ({"structured_outputs": {"json": "{", "disable_additional_properties": True}}, "structured_outputs.json", "JSON"),
    (
        {"structured_outputs": {"json": '{"items":' * 900 + "{}" + "}" * 900, "disable_additional_properties": True}},
        "structured_outputs.json",
        "nested",
    ),
    (json_schema(schema={"type": "integer", "multipleOf": 86_400}), "response_format.json_schema.schema", "multipleOf"),
    ({"structured_outputs": {"structural_tag": "[]"}}, "structured_outputs.structural_tag", "object"),
    ({"structured_outputs": {"regex": "a", "backend": "x"}}, "structured_outputs.backend", "backend"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs", "two"),
    ({"guided_json": SCHEMA}, "guided_json", "structured_outputs.json"),
    ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "a" * 200_001}}, "structured_outputs.regex", "over 200000"),
]


@pytest.mark.parametrize(("body", "param", "says"), BAD, ids=lambda value: str(value)[:50])
async def test_what_is_no_form_is_refused_by_its_name_before_any_node_is_asked(
    body: dict[str, object], param: str, says: str
) -> None:
    rig = await make_rig()
    reply = await ask(rig, body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert says in error["message"]
    assert not [request for node in rig.nodes.nodes for request in node.generates]


async def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, object] = {}
    for _ in range(300):
        schema = {"properties": {"a": schema}}
    reply = await ask(await make_rig(), json_schema(schema=schema))
    assert reply.status_code == 400 and "deeper than 64" in reply.json()["error"]["message"]


async def test_nodes_that_know_no_grammars_are_named() -> None:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.protocol = 2
    reply = await ask(await make_rig(nodes), json_schema())
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "response_format")
    assert "none of the nodes that are up" in error["message"]


async def test_where_engines_have_libraries_of_their_own_texts_alone_are_checked() -> None:
    checks = GrammarChecks(None)
    await checks.check(grammar(GrammarKind.JSON, {"not": {}}), "f")
    with pytest.raises(Exception, match="f: it is no JSON schema"):
        await checks.check(grammar(GrammarKind.JSON, "{"), "f")
    checks.close()


@pytest.mark.parametrize(
    ("path", "body", "error", "param"),
    [
        ("completions", {"structured_outputs": {"regex": "a"}}, InvalidRequestError("no"), "structured_outputs"),
        ("chat/completions", json_schema(), InvalidRequestError("no"), "response_format"),
        ("responses", {"text": {"format": {"type": "json_object"}}}, InvalidRequestError("no"), "text"),
        ("completions", {"structured_outputs": {"regex": "a"}}, InvalidRequestError("no", param="seed"), "seed"),
        ("completions", {"structured_outputs": {"regex": "a"}}, ContextLengthError("long"), None),
        ("completions", {}, InvalidRequestError("no"), None),
    ],
)
async def test_a_form_that_only_an_engine_refuses_is_named(
    path: str, body: dict[str, object], error: InvalidRequestError, param: str | None
) -> None:
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.generate_error = error
    reply = await ask(rig, body, path)
    said = reply.json()["error"]
    assert (reply.status_code, said["param"]) == (400, param)
    assert error.message in said["message"]


async def test_the_routers_own_thread_checks_them() -> None:
    checks = GrammarChecks(Grammars(ByteTokenizer(VOCAB).vocabulary, ()))
    try:
        await checks.check(grammar(GrammarKind.JSON, SCHEMA), "f")
    finally:
        checks.close()


MARKS = ReasoningMarks(closing=((8, 9),), opening=(7,), blanks=frozenset({1}))
REGEX = grammar(GrammarKind.REGEX, "a")
INSIDE = grammar(GrammarKind.REGEX, "a", after=((8, 9),))


@pytest.mark.parametrize(
    ("prompt", "continues", "wanted"),
    [
        ([5, 6], False, grammar(GrammarKind.REGEX, "a", after=((8, 9),), opening=(7,))),
        ([5, 7], False, INSIDE),
        ([5, 7, 1, 1], False, INSIDE),
        ([5, 7, 1, 8, 9, 1], False, REGEX),
        ([7, 4, 8, 9, 5, 6], False, grammar(GrammarKind.REGEX, "a", after=((8, 9),), opening=(7,))),
        ([7, 4], True, INSIDE),
        ([7, 4, 8, 9, 4], True, REGEX),
        ([4], True, REGEX),
    ],
)
def test_a_grammar_begins_behind_the_reasoning(prompt: list[int], continues: bool, wanted: Grammar) -> None:
    assert MARKS.place(REGEX, prompt, continues=continues) == wanted


def test_where_every_answer_reasons_the_grammar_waits_for_the_answers_mark() -> None:
    framed = ReasoningMarks(closing=((8,), (9,)))
    assert framed.place(REGEX, [5], continues=False).after == ((8,), (9,))
    assert framed.place(REGEX, [5, 9], continues=False) == REGEX


@pytest.mark.parametrize(("tenant", "wanted"), [("", "somebody"), ("t1", "t1")])
async def test_forms_wait_in_turns_of_tenants_or_where_there_are_none_of_users(
    monkeypatch: pytest.MonkeyPatch, tenant: str, wanted: str
) -> None:
    owners: list[object] = []
    matcher = Grammars.matcher

    async def seen(self: Grammars, grammar: Grammar, owner: object = "") -> GrammarMatcher:
        owners.append(owner)
        return await matcher(self, grammar, owner)

    def guard(_: RequestLog, app: ASGIApp) -> ASGIApp:
        async def called(scope: Scope, receive: Receive, send: Send) -> None:
            set_caller(scope, Caller(tenant=tenant))
            await app(scope, receive, send)

        return called

    monkeypatch.setattr(Grammars, "matcher", seen)
    rig = await make_rig(guard=guard)
    assert (await ask(rig, {"structured_outputs": {"regex": "a"}, "user": "somebody"})).status_code == 200
    assert owners == [wanted]
