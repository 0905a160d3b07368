"""A request's grammar as llguidance reads it. Pure.

Owns what of a grammar is refused before it is compiled, and how JSON is told to be written.
"""

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLTokenizer

from kvcore.errors import InvalidRequestError
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.grammars.limits import GrammarLimits
from nodeapi.grammars.multiples import check_multiples
from nodeapi.grammars.structural_tags import lark_source, tags_source

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions


def source_of(grammar: Grammar, vocabulary: LLTokenizer, limits: GrammarLimits = GrammarLimits()) -> str:
    """The text that a matcher is made of. Raises InvalidRequestError for what is too large, or no grammar of its kind;
    whether it can be compiled is seen later."""
    check_text(grammar, limits)
    try:
        match grammar.kind:
            case GrammarKind.JSON:
                options = _json_options(grammar)
                return str(LLMatcher.grammar_from_json_schema(grammar.text, defaults=options))
            case GrammarKind.REGEX:
                return str(LLMatcher.grammar_from_regex(grammar.text))
            case GrammarKind.CHOICE:
                return str(LLMatcher.grammar_from_lark(_one_of(json.loads(grammar.text))))
            case GrammarKind.GRAMMAR:
                return lark_source(grammar.text, limits)
            case GrammarKind.STRUCTURAL_TAG:
                return tags_source(json.loads(grammar.text), vocabulary, _json_options(grammar), limits)
    except (ValueError, KeyError, RecursionError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InvalidRequestError(f"it is no {_NAMES[grammar.kind]}: {said}") from error


def check_text(grammar: Grammar, limits: GrammarLimits = GrammarLimits()) -> None:
    """What can be said without compiling it. Raises InvalidRequestError where it is too large or nested too deeply, or
    no JSON where it must be."""
    if len(grammar.text) > limits.max_chars:
        raise InvalidRequestError(f"it has {len(grammar.text)} characters, over {limits.max_chars}")
    if grammar.kind in (GrammarKind.REGEX, GrammarKind.GRAMMAR):
        return
    try:
        whole = _json_of(grammar)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"it is no {_NAMES[grammar.kind]}: {error}") from error
    level, depth = [whole], 0
    while level := [part for one in level for part in _parts(one, limits.max_members)]:
        depth += 1
        if depth > limits.max_nesting:
            raise InvalidRequestError(f"it is nested deeper than {limits.max_nesting} levels")
    check_multiples([whole], limits)


def _one_of(choices: list[str]) -> str:
    """In Lark: as one terminal, since alternatives of a rule are as many places that the parser is at at once."""
    texts = " | ".join(json.dumps(choice) for choice in choices if choice)
    return f"start: CHOICE{'?' * ('' in choices)}\nCHOICE: {texts}\n" if texts else 'start: ""'


def _json_of(grammar: Grammar) -> object:
    """Raises ValueError where it is not of the type that its kind wants."""
    value: object = json.loads(grammar.text)
    is_right = {
        GrammarKind.JSON: isinstance(value, dict | bool),
        GrammarKind.CHOICE: isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value),
        GrammarKind.STRUCTURAL_TAG: isinstance(value, dict),
    }
    if not is_right[grammar.kind]:
        raise ValueError("a list of one text or more" if grammar.kind == GrammarKind.CHOICE else "an object is wanted")
    return value


def _parts(value: object, most: int) -> list[object]:
    if isinstance(value, dict) and len(value) > most:
        raise InvalidRequestError(f"an object in it has {len(value)} members, over {most}")
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in parts if isinstance(part, dict | list)]


def _json_options(grammar: Grammar) -> "JsonCompileOptions":
    """llguidance's. Branches of `oneOf` that it cannot tell apart are as those of `anyOf`: in xgrammar all are."""
    match grammar.whitespace:
        case None:
            return {"coerce_one_of": True, "whitespace_flexible": True}
        case "":
            return {"coerce_one_of": True, "whitespace_flexible": False}
        case pattern:
            return {"coerce_one_of": True, "whitespace_flexible": True, "whitespace_pattern": pattern}


_NAMES = {
    GrammarKind.JSON: "JSON schema",
    GrammarKind.REGEX: "regular expression",
    GrammarKind.CHOICE: "list of choices",
    GrammarKind.GRAMMAR: "grammar",
    GrammarKind.STRUCTURAL_TAG: "structural tag",
}
