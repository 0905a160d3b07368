"""The grammars of calls: those that must be made, and those whose arguments must follow their schema. Pure.

Source: xgrammar's structural tags, as vLLM's server makes them for each family of models, and the models' templates.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvcore.errors import InvalidRequestError
from nodeapi.grammars.grammar import Grammar, GrammarKind
from router.parsing.argument_forms import Format, Schema, UnwritableError, json_arguments

_NAME = re.compile(r"[\w.-]+")
Schemas = Mapping[str, Schema]
"""What the arguments of each function must follow, by its name."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a family of models writes a call: `begin`, with the function's name between its two texts, the `arguments`,
    `end`. `triggers`: by what calls begin amid text; none: they do not. `separator`: between two; None: there is one at
    most. `around`: before the first and after the last of those that come together."""

    begin: tuple[str, str]
    end: str
    triggers: tuple[str, ...] = ()
    separator: str | None = ""
    around: tuple[str, str] = ("", "")
    arguments: Callable[[Schema], Format] = json_arguments
    """What stands between `begin` and `end`, as a structural tag. Raises UnwritableError."""
    quoted: bool = False
    """The name is within a JSON string."""
    gap: str = ""
    """A regular expression: what may stand between `around` and the first call."""
    before: Format | None = None
    """Of one whose answers are framed: what may come before the calls, in the terms of structural tags. With it they
    are the whole answer, reasoning included."""

    def tag(self, name: str, schema: Schema) -> Format:
        """Of the calls of one function. Raises UnwritableError where they cannot be held to `schema` in this form."""
        return self._tag(name, self.arguments(schema))

    def free_tag(self, name: str) -> Format:
        """Of the calls of a function whose arguments may be anything. Raises UnwritableError because of its name."""
        try:
            return self.tag(name, {"type": "object"})
        except UnwritableError:
            return self._tag(name, {"type": "any_text"})

    def can_write(self, schemas: Schemas) -> bool:
        """Whether calls of all these functions can be held to their schemas."""
        try:
            return bool([self.tag(name, schema) for name, schema in schemas.items()])
        except UnwritableError:
            return False

    def together(self, tags: list[Format], *, one: bool) -> Format:
        """Calls that come together, at least one."""
        stop = one or self.separator is None
        calls: Format = {"type": "tags_with_separator", "tags": tags, "separator": self.separator or ""}
        calls = {**calls, "at_least_one": True, "stop_after_first": stop}
        if self.gap:
            calls = {"type": "sequence", "elements": [{"type": "regex", "pattern": self.gap}, calls]}
        if not self.around[0]:
            return calls
        return {"type": "tag", "begin": self.around[0], "content": calls, "end": self.around[1]}

    def _tag(self, name: str, content: Format) -> Format:
        if not self.quoted and _NAME.fullmatch(name) is None:
            raise UnwritableError("its name has other characters than letters, digits, '_', '.' and '-'")
        written = json.dumps(name)[1:-1] if self.quoted else name
        return {"type": "tag", "begin": written.join(self.begin), "content": content, "end": self.end}


def forced_calls(form: CallForm | None, schemas: Schemas, *, one: bool) -> Grammar:
    """At least one call of these functions and nothing else; `one`: no more. `form` None: a list of calls in JSON."""
    if form is None:
        return Grammar(kind=GrammarKind.JSON, text=json.dumps(_list_schema(schemas, one=one)))
    calls = form.together([form.tag(name, schema) for name, schema in schemas.items()], one=one)
    return _structural(calls if form.before is None else {"type": "sequence", "elements": [form.before, calls]})


def forced_arguments(schema: Schema) -> Grammar:
    """The arguments of one call alone."""
    return Grammar(kind=GrammarKind.JSON, text=json.dumps(schema or {"type": "object", "properties": {}}))


def strict_calls(form: CallForm, schemas: Mapping[str, Schema | None], *, one: bool) -> Grammar:
    """Any text, and in it any number of calls of these functions; `one`: at most one, and nothing behind it. None: its
    arguments may be anything. Raises InvalidRequestError that names the function which cannot be held to its schema."""
    tags = [_strict_tag(form, name, schema) for name, schema in schemas.items()]
    triggers = form.triggers
    if form.around[0]:
        triggers, tags = form.around[:1], [form.together(tags, one=one)]
    else:
        begins = [(tag, str(tag["begin"])) for tag in tags]
        tags = [{**tag, "begin": begin[begin.index(trigger) :]} for trigger in triggers for tag, begin in begins]
    form_: Format = {"type": "triggered_tags", "triggers": list(triggers), "tags": tags, "stop_after_first": one}
    return _structural(form_)


def _strict_tag(form: CallForm, name: str, schema: Schema | None) -> Format:
    try:
        return form.free_tag(name) if schema is None else form.tag(name, schema)
    except UnwritableError as error:
        said = f"tools: calls of {name[:64]!r} cannot be held to a schema in the form in which this model writes them:"
        raise InvalidRequestError(f"{said} {error}; leave out its strict, or use tool_choice", param="tools") from error


def _structural(form: Format) -> Grammar:
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
