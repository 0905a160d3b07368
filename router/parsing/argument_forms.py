"""How families of models write the arguments of a call, as structural tags: JSON, a tag each, Gemma's objects. Pure.

What is let through is read back by the family's dialect as arguments that follow the schema; where that cannot be said
there is no tag. Properties come in the order in which the schema has them, as in grammars of JSON.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from router.parsing.arguments import value_kinds

Format = Mapping[str, object]
"""A structural tag."""
Schema = Mapping[str, object]
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})
_DEFINITIONS = ("$defs", "definitions")
_OF_OBJECTS = _ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$schema", *_DEFINITIONS}
_MAX_DEPTH = 4
"""Of Gemma's objects and lists: each level is six of a structural tag's, which has a bound."""
_MAX_OPTIONAL = 12
"""Of an object of Gemma's in which nothing is required: where its commas are depends on which property comes first."""
_MAX_COPIES = 64
"""Of one object within others: such a property is written once for each that may come first, what a list has twice."""


class UnwritableError(Exception):
    """These arguments cannot be held to their schema in this form. Its text says why."""


def json_arguments(schema: Schema) -> Format:
    """As JSON. Without a schema they are any object."""
    return {"type": "json_schema", "json_schema": schema or {"type": "object"}}


def numbered_json(schema: Schema) -> Format:
    """Kimi K2's: the number of the call, a mark, JSON."""
    marked = [{"type": "regex", "pattern": "[0-9]{1,4}"}, _const("<|tool_call_argument_begin|>")]
    return {"type": "sequence", "elements": [*marked, json_arguments(schema)]}


@dataclass(frozen=True, slots=True)
class TaggedArguments:
    """A tag for each: `begin`, with the key between its two texts, the value, `end`, `after`. A value that is a string
    is written as it is, any other as JSON. `text`: a regular expression of the strings that can be written, and of
    `end` behind them; empty: all without `end`."""

    begin: tuple[str, str]
    end: str
    after: str
    text: str = ""

    def __call__(self, schema: Schema) -> Format:
        """Raises UnwritableError."""
        properties, required = _properties(schema)
        if properties is None:
            key = {"type": "regex", "pattern": r"[A-Za-z_][A-Za-z0-9_]*"}
            anything = _sequence(_const(self.begin[0]), key, self._text(self.begin[1]), _const(self.after))
            return {"type": "star", "content": anything}
        parts: list[Format] = []
        for name, value in properties.items():
            if re.fullmatch(r"[^\s<>]+", name) is None:
                raise UnwritableError(f"its property {name!r} has a name that cannot be written")
            try:
                part = _sequence(self._value(name.join(self.begin), value, schema), _const(self.after))
            except UnwritableError as error:
                raise UnwritableError(f"its property {name!r} {error}") from error
            parts.append(part if name in required else {"type": "optional", "content": part})
        return _sequence(*parts)

    def _value(self, begin: str, schema: Schema, root: Schema) -> Format:
        kinds = value_kinds(schema)
        if "string" not in kinds:
            json_value = {"type": "json_schema", "json_schema": _with_definitions(schema, root)}
            return {"type": "tag", "begin": begin, "content": json_value, "end": self.end}
        if (options := _options(schema)) is None:
            if not _is_any_string(schema):
                raise UnwritableError("is a string with bounds, and strings are written as they are")
            return self._text(begin)
        texts: list[Format] = []
        for option in options:
            if not isinstance(option, str | None) or (kinds != {"string"} and option == "null"):
                raise UnwritableError("has values that cannot be told from strings")
            text = "null" if option is None else option
            if not self._can_write(text):
                raise UnwritableError("has a value that ends its tag")
            texts.append(_const(f"{begin}{text}{self.end}"))
        return {"type": "or", "elements": texts}

    def _text(self, begin: str) -> Format:
        """Any string behind `begin`, and the end behind it."""
        if not self.text:
            return {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": self.end}
        return _sequence(_const(begin), {"type": "regex", "pattern": self.text})

    def _can_write(self, text: str) -> bool:
        return re.fullmatch(self.text, text + self.end) is not None if self.text else self.end not in text


def lines_without(*beginnings: str, then: str) -> str:
    """The regular expression of lines of which none begins with one of these texts, and of `then` behind them."""
    line = _no_beginning(beginnings)
    return f"{line}(\\n{line})*{_escaped(then)}"


def _no_beginning(beginnings: Sequence[str]) -> str:
    """Of a line: where one of them could begin it, the line ends before, or goes on otherwise."""
    by_first: dict[str, list[str]] = {}
    for text in beginnings:
        by_first.setdefault(text[0], []).append(text[1:])
    others = "".join(map(_escaped, by_first))
    ways = [f"[^\\n{others}][^\\n]*"]
    ways += [f"{_escaped(first)}{_no_beginning(rest)}" for first, rest in by_first.items() if "" not in rest]
    return f"({'|'.join(ways)})?"


def _escaped(text: str) -> str:
    """For a regular expression in every dialect: letters, digits and blanks stay, a newline is named."""
    return "".join(c if c.isalnum() or c in " _<>=" else "\\n" if c == "\n" else f"\\{c}" for c in text)


def gemma_arguments(schema: Schema) -> Format:
    """Gemma 4's: an object whose keys have no quotes, and whose strings stand between marks of their own, without the
    brace that opens it and with that which closes it. Raises UnwritableError."""
    return _gemma_members(schema, 0, 1)


def _gemma_members(schema: Schema, depth: int, copies: int) -> Format:
    properties, required = _properties(schema)
    if properties is None:
        if schema:
            raise UnwritableError("an object is of any properties, and names of keys have no quotes")
        properties = {}
    if depth > _MAX_DEPTH:
        raise UnwritableError(f"it is nested deeper than {_MAX_DEPTH} levels")
    if not any(name in required for name in properties):
        copies *= max(1, len(properties))
    written: dict[str, Format] = {}
    for name, value in properties.items():
        if re.fullmatch(r"[\w.-]+", name) is None:
            raise UnwritableError(f"its property {name!r} has a name that cannot be written")
        written[name] = _sequence(_const(f"{name}:"), _gemma_value(value, depth + 1, copies))
    first = [written[name] for name in written if name in required]
    others = [written[name] for name in written if name not in required]
    if len(others) > _MAX_OPTIONAL and not first:
        raise UnwritableError(f"it has an object of more than {_MAX_OPTIONAL} properties of which none is required")
    ways = [_listed(first, others)] if first else [_listed(others[at : at + 1], others[at + 1 :]) for at in _at(others)]
    members: Format = {"type": "or", "elements": ways} if len(ways) > 1 else ways[0] if ways else _const("")
    if not first and ways:
        members = {"type": "optional", "content": members}
    return _sequence(members, _const("}"))


def _at(items: Sequence[object]) -> range:
    return range(len(items))


def _listed(items: Sequence[Format], optional: Sequence[Format]) -> Format:
    """All of `items`, and any of `optional`, with commas between."""
    comma = _const(",")
    parts = [part for item in items for part in (comma, item)][1:]
    more: list[Format] = [{"type": "optional", "content": _sequence(comma, item)} for item in optional]
    return _sequence(*parts, *more)


def _gemma_value(schema: Schema, depth: int, copies: int) -> Format:
    ways = next((schema[way] for way in ("anyOf", "oneOf") if way in schema), None)
    if isinstance(ways, list) and ways and schema.keys() <= _ANNOTATIONS | {"anyOf"}:
        return {"type": "or", "elements": [_gemma_value(_mapping(one), depth, copies) for one in ways]}
    kind = schema.get("type")
    if isinstance(kind, list) and schema.keys() <= _ANNOTATIONS | {"type"}:
        return {"type": "or", "elements": [_gemma_value({"type": one}, depth, copies) for one in kind]}
    options = _options(schema)
    if options is not None and all(isinstance(one, str) for one in options):
        texts = [str(one) for one in options]
        if any(_QUOTE in text for text in texts):
            raise UnwritableError("it has a string that ends its marks")
        return {"type": "or", "elements": [_const(f"{_QUOTE}{text}{_QUOTE}") for text in texts]}
    if kind == "string" and _is_any_string(schema):
        return {"type": "tag", "begin": _QUOTE, "content": {"type": "any_text"}, "end": _QUOTE}
    if kind in ("integer", "number", "boolean", "null") and not schema.keys() & {"$ref", "allOf", "anyOf", "oneOf"}:
        return {"type": "json_schema", "json_schema": schema}
    if kind == "object":
        if copies > _MAX_COPIES:
            raise UnwritableError("it has objects of many optional properties within each other")
        return _sequence(_const("{"), _gemma_members(schema, depth, copies))
    if kind == "array" and "items" in schema and schema.keys() <= _ANNOTATIONS | {"type", "items"}:
        if depth > _MAX_DEPTH:
            raise UnwritableError(f"it is nested deeper than {_MAX_DEPTH} levels")
        item = _gemma_value(_mapping(schema["items"]), depth + 1, 2 * copies)
        more = {"type": "star", "content": _sequence(_const(","), item)}
        return _sequence(_const("["), {"type": "optional", "content": _sequence(item, more)}, _const("]"))
    raise UnwritableError("it has a value that is none of: a string, a number, true, false, null, a list or an object")


_QUOTE = '<|"|>'


def _properties(schema: Schema) -> tuple[Mapping[str, Schema] | None, Sequence[str]]:
    """(those of an object, by name, which must be there). None: any. Raises UnwritableError where its schema says more
    than that."""
    if not schema:
        return {}, ()  # OpenAI: a function without parameters is called without arguments
    if more := sorted(schema.keys() - _OF_OBJECTS):
        raise UnwritableError(f"it has {more[0]!r} beside its properties")
    if schema.get("type") != "object":
        raise UnwritableError("it is of another type than object")
    if "properties" not in schema and schema.get("additionalProperties") is not False:
        if schema.get("additionalProperties", True) is not True or schema.get("required"):
            raise UnwritableError("it has properties without names")
        return None, ()
    given, required = schema.get("properties", {}), schema.get("required", [])
    if (
        not isinstance(given, Mapping)
        or not isinstance(required, list)
        or any(one not in list(given) for one in required)
    ):
        raise UnwritableError("it requires properties that it does not have")
    return {str(name): _mapping(value) for name, value in given.items()}, required


def _mapping(schema: object) -> Schema:
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise UnwritableError("has a schema that is no object")
    return schema


def _options(schema: Schema) -> list[object] | None:
    """The only values that it has; None: it has others. Raises UnwritableError where it says more."""
    if "const" not in schema and "enum" not in schema:
        return _options_of_all(schema)
    options = [schema["const"]] if "const" in schema else schema["enum"]
    if not isinstance(options, list) or not schema.keys() <= _ANNOTATIONS | {"type", "const", "enum"}:
        raise UnwritableError("has values and other bounds")
    return options


def _options_of_all(schema: Schema) -> list[object] | None:
    """Those of all ways that there are, as pydantic writes one of several values, or none."""
    ways = schema.get("anyOf")
    if not isinstance(ways, list) or not schema.keys() <= _ANNOTATIONS | {"anyOf"}:
        return None
    options = list[object]()
    for way in map(_mapping, ways):
        found = [None] if way == {"type": "null"} else _options(way)
        if found is None:
            return None
        options += found
    return options


def _is_any_string(schema: Schema) -> bool:
    """Whether every string follows it. One that reads `null` is null where that may be."""
    kinds, rest = value_kinds(schema), schema.keys() - _ANNOTATIONS
    if "string" not in kinds:
        return False
    if rest == {"type"}:
        return True
    if len(rest) != 1 or not rest <= {"anyOf", "oneOf"}:
        return False
    (way,) = rest
    options = schema[way]
    strings = [one for one in options if "string" in value_kinds(one)] if isinstance(options, list) else []
    return any(map(_is_any_string, strings)) and (way == "anyOf" or len(strings) == 1)


def _with_definitions(schema: Schema, root: Schema) -> Schema:
    """`schema` alone, with the definitions that it refers to and those that they do. Raises UnwritableError where one
    is elsewhere."""
    kept: dict[str, dict[str, object]] = {}
    rest = _references(schema)
    while rest:
        reference = rest.pop()
        beginning, place, escaped = (*reference.split("/"), "", "")[:3]
        if beginning != "#" or place not in _DEFINITIONS:
            raise UnwritableError(f"refers to {reference!r}")
        name, known = unquote(escaped).replace("~1", "/").replace("~0", "~"), root.get(place)
        if isinstance(known, Mapping) and name in known and name not in kept.setdefault(place, {}):
            kept[place][name] = known[name]
            rest += _references(known[name])
    return {**schema, **kept}


def _references(schema: object) -> "list[str]":
    if isinstance(schema, Mapping):
        own = [str(schema["$ref"])] if isinstance(schema.get("$ref"), str) else []
        return own + [name for part in schema.values() for name in _references(part)]
    return [name for part in schema for name in _references(part)] if isinstance(schema, list) else []


def _sequence(*parts: Format) -> Format:
    if len(parts) == 1:
        return parts[0]
    return {"type": "sequence", "elements": list(parts)} if parts else _const("")


def _const(text: str) -> Format:
    return {"type": "const_string", "value": text}
