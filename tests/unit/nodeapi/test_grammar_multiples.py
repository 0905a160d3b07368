"""How many remainders a grammar's `multipleOf` has: those of one value together, others one after the other."""

import json
from functools import partial
from typing import Any

import pytest

from kvcore.errors import InvalidRequestError
from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.grammars.source import check_text
from nodeapi.grammars.vocabulary import byte_vocabulary
from router.parsing.call_forms import forced_calls
from router.parsing.dialects import DIALECTS

CENT, THOUSAND = {"type": "number", "multipleOf": 0.01}, {"type": "number", "multipleOf": 1000}
TOOLS: Any = {
    "pay": {"type": "object", "properties": {"price": CENT}, "required": ["price"]},
    "order": {"type": "object", "properties": {"price": THOUSAND}, "required": ["price"]},
}


def props(**fields: object) -> dict[str, object]:
    return {"type": "object", "properties": fields}


APART: list[Any] = [
    props(a=CENT, b=THOUSAND),
    props(a=props(c=CENT), b=props(c=THOUSAND)),
    {"anyOf": [props(a=CENT), props(a=THOUSAND)]},
    {"type": "array", "items": {"anyOf": [props(a=CENT), props(a=THOUSAND)]}},
    props(a={"type": "array", "items": CENT}, b={"type": "array", "items": THOUSAND}),
    props(a={"multipleOf": 9001}, b={"multipleOf": 9007}),
    {**props(**{f"p{number}": CENT for number in range(100)}), "additionalProperties": {"multipleOf": 50}},
]
TOGETHER: list[Any] = [
    {"anyOf": [CENT, THOUSAND]},
    {"allOf": [CENT, THOUSAND]},
    {"allOf": [props(a=CENT), props(a=THOUSAND)]},
    {"allOf": [{"anyOf": [props(a=CENT), props(b=CENT)]}, props(a=THOUSAND)]},
    {**props(a=CENT), "anyOf": [props(a=THOUSAND), props(b=CENT)]},
    {"anyOf": [props(a=CENT)], "oneOf": [props(a=THOUSAND)]},
    {"type": "array", "prefixItems": [CENT], "items": THOUSAND},
    {**props(a=CENT), "additionalProperties": THOUSAND},
    {**props(a=CENT, b={"$ref": "#/$defs/b"}), "$defs": {"b": THOUSAND}},
    props(**{f"p{number}": {"multipleOf": 9000 + number} for number in range(12)}),
]


@pytest.mark.parametrize("schema", APART, ids=range(len(APART)))
async def test_different_values_do_not_meet_and_are_compiled(schema: Any) -> None:
    grammars = Grammars(partial(byte_vocabulary, 300, 0), [0])
    try:
        await grammars.matcher(Grammar(kind=GrammarKind.JSON, text=json.dumps(schema)))
    finally:
        grammars.close()


@pytest.mark.parametrize("schema", TOGETHER, ids=range(len(TOGETHER)))
@pytest.mark.parametrize("kind", [GrammarKind.JSON, GrammarKind.GRAMMAR, GrammarKind.STRUCTURAL_TAG])
def test_those_that_may_meet_are_refused_together(schema: Any, kind: GrammarKind) -> None:
    form = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    texts = {GrammarKind.JSON: schema, GrammarKind.STRUCTURAL_TAG: form}
    text = f"start: %json {json.dumps(schema)}" if kind is GrammarKind.GRAMMAR else json.dumps(texts[kind])
    grammars = Grammars(partial(byte_vocabulary, 300, 0), [0])
    with pytest.raises(InvalidRequestError, match="multipleOf is too large"):
        grammars._compile(Grammar(kind=kind, text=text))


@pytest.mark.parametrize("name", ["", *(name for name, dialect in DIALECTS.items() if dialect.form is not None)])
def test_of_several_tools_each_has_its_own(name: str) -> None:
    check_text(forced_calls(DIALECTS[name].form if name else None, TOOLS, one=False))
