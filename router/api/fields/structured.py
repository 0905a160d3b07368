"""The form that an answer must have, as clients ask for it: `response_format` and `structured_outputs`.

Owns the names of both and of what is in them. Whether it can be compiled is seen later (`router.text.grammar_checks`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from kvcore.errors import InvalidRequestError
from nodeapi.grammars.grammar import Grammar, GrammarKind
from router.api.fields.checks import require

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_ANY_OBJECT = '{"type": "object"}'


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's: one of the first six, and how JSON is written."""

    json: str | dict[str, object] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, object] | None = None
    disable_any_whitespace: bool | None = False
    disable_additional_properties: bool | None = False
    whitespace_pattern: str | None = None


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """A grammar and the field that asked for it, for errors."""

    grammar: Grammar
    param: str
    whole: bool = False
    """It is of the whole answer, reasoning included."""

    @property
    def field(self) -> str:
        """The field of the body."""
        return self.param.partition(".")[0]


def asked_grammar(
    response_format: Mapping[str, object] | None, outputs: StructuredOutputs | None
) -> AskedGrammar | None:
    """None: the answer may have any form. Raises InvalidRequestError with the name of what is wrong."""
    formatted = _of_response_format(response_format) if response_format is not None else None
    if outputs is None:
        return formatted
    require(formatted is None, "structured_outputs", "and response_format are two forms for one answer: leave one out")
    return _of_structured_outputs(outputs)


def _of_response_format(given: Mapping[str, object]) -> AskedGrammar | None:
    name, kind = "response_format", given.get("type")
    match kind:
        case "text":
            return None
        case "json_object":
            return AskedGrammar(Grammar(kind=GrammarKind.JSON, text=_ANY_OBJECT), name)
        case "structural_tag":
            has_form = "format" in given or ("structures" in given and "triggers" in given)
            require(has_form, f"{name}.format", "is missing")
            return AskedGrammar(Grammar(kind=GrammarKind.STRUCTURAL_TAG, text=json.dumps(given)), name)
        case "json_schema":
            named = given.get("json_schema")
            where = f"{name}.json_schema"
            if not isinstance(named, Mapping):
                raise InvalidRequestError(f"{where} is missing: an object with a name and a schema", param=where)
            require(isinstance(named.get("name"), str), f"{where}.name", "is a text")
            require(named.get("strict") in (None, True, False), f"{where}.strict", "is true or false")
            schema = named.get("schema")
            require(isinstance(schema, Mapping), f"{where}.schema", "is an object")
            return AskedGrammar(Grammar(kind=GrammarKind.JSON, text=json.dumps(schema)), f"{where}.schema")
    names = "text, json_object, json_schema or structural_tag"
    raise InvalidRequestError(f"{name}.type is {names}", param=f"{name}.type")


def _of_structured_outputs(outputs: StructuredOutputs) -> AskedGrammar:
    given = [name for name in _KINDS if getattr(outputs, name) is not None]
    require(len(given) == 1, "structured_outputs", f"has one of {', '.join(_KINDS)}")
    require(outputs.json_object is not False, "structured_outputs.json_object", "is true where it is given")
    name, param = given[0], f"structured_outputs.{given[0]}"
    kind, text = _MAKES[name](outputs)
    whitespace = "" if outputs.disable_any_whitespace else outputs.whitespace_pattern
    require(bool(text.strip()) or name == "regex", param, "must not be empty")
    return AskedGrammar(Grammar(kind=kind, text=text, whitespace=whitespace), param)


def _json(outputs: StructuredOutputs) -> tuple[GrammarKind, str]:
    schema: object = outputs.json
    if not outputs.disable_additional_properties:
        return GrammarKind.JSON, _as_text(schema)
    param = "structured_outputs.json"
    try:
        whole = msgspec.json.decode(schema) if isinstance(schema, str) else schema
        return GrammarKind.JSON, json.dumps(_closed(whole))
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise InvalidRequestError(f"{param} is no JSON: {error}", param=param) from error
    except RecursionError as error:
        raise InvalidRequestError(f"{param} is nested too deeply", param=param) from error


def _closed(schema: object) -> object:
    """`schema`, of whose objects the named properties are all there are unless it says otherwise, as in vLLM."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if "properties" in schema or "patternProperties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_MAKES: Mapping[str, Callable[[StructuredOutputs], tuple[GrammarKind, str]]] = {
    "json": _json,
    "regex": lambda outputs: (GrammarKind.REGEX, outputs.regex or ""),
    "choice": lambda outputs: (GrammarKind.CHOICE, json.dumps(outputs.choice)),
    "grammar": lambda outputs: (GrammarKind.GRAMMAR, outputs.grammar or ""),
    "json_object": lambda outputs: (GrammarKind.JSON, _ANY_OBJECT),
    "structural_tag": lambda outputs: (GrammarKind.STRUCTURAL_TAG, _as_text(outputs.structural_tag)),
}
