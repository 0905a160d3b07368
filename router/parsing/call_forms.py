"""The grammars of calls: those that must be made, and those whose arguments must follow their schema. Pure.

Source: xgrammar's structural tags, as vLLM's server makes them for each family of models.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from kvcore.errors import InvalidRequestError
from nodeapi.grammars.grammar import Grammar, GrammarKind

_ANY_OBJECT: Mapping[str, object] = {"type": "object"}
Schemas = Mapping[str, Mapping[str, object]]
"""What the arguments of each function must follow, by its name."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a family of models writes a call whose arguments are JSON: `begin`, with the function's name between its two
    texts, the arguments, `end`. `trigger`: by what a call begins amid text; empty: it does not. `separator`: between
    two; None: there is one at most."""

    begin: tuple[str, str]
    end: str
    trigger: str
    separator: str | None = ""
    before: Mapping[str, object] | None = None
    """Of one whose answers are framed: what may come before the calls, in the terms of structural tags. With it they
    are the whole answer, reasoning included."""

    def tag(self, name: str, schema: Mapping[str, object]) -> Mapping[str, object]:
        """Of the calls of one function."""
        content = {"type": "json_schema", "json_schema": schema}
        return {"type": "tag", "begin": json.dumps(name)[1:-1].join(self.begin), "content": content, "end": self.end}


def forced_calls(form: CallForm | None, schemas: Schemas, *, one: bool) -> Grammar:
    """At least one call of these functions and nothing else; `one`: no more. `form` None: a list of calls in JSON."""
    if form is None:
        return Grammar(kind=GrammarKind.JSON, text=json.dumps(_list_schema(schemas, one=one)))
    calls = {
        "type": "tags_with_separator",
        "tags": [form.tag(name, schema or _ANY_OBJECT) for name, schema in schemas.items()],
        "separator": form.separator or "",
        "at_least_one": True,
        "stop_after_first": one or form.separator is None,
    }
    if form.before is None:
        return _structural(**calls)
    return _structural(type="sequence", elements=[form.before, calls])


def forced_arguments(schema: Mapping[str, object]) -> Grammar:
    """The arguments of one call alone."""
    return Grammar(kind=GrammarKind.JSON, text=json.dumps(schema or {"type": "object", "properties": {}}))


def strict_calls(form: CallForm, schemas: Schemas) -> Grammar:
    """Any text, and in it any number of calls of these functions."""
    tags = [form.tag(name, schema or _ANY_OBJECT) for name, schema in schemas.items()]
    return _structural(type="triggered_tags", triggers=[form.trigger], tags=tags)


def _structural(**form: object) -> Grammar:
    return Grammar(kind=GrammarKind.STRUCTURAL_TAG, text=json.dumps({"type": "structural_tag", "format": form}))


def _list_schema(schemas: Schemas, *, one: bool) -> Mapping[str, object]:
    """Definitions that a function's schema refers to are the whole list's. Raises InvalidRequestError where two differ
    that have one name."""
    definitions: dict[str, object] = {}
    calls = []
    for name, schema in schemas.items():
        own = dict(schema or {"type": "object", "properties": {}})
        shared = own.pop("$defs", None)
        for key, value in shared.items() if isinstance(shared, Mapping) else ():
            if definitions.setdefault(key, value) != value:
                raise InvalidRequestError(f"tools: two functions define #/$defs/{key}, and not the same", param="tools")
        fields = {"name": {"type": "string", "enum": [name]}, "parameters": own}
        calls.append({"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False})
    whole: dict[str, object] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return whole | ({"maxItems": 1} if one else {}) | ({"$defs": definitions} if definitions else {})
