"""Structural tags, as xgrammar and vLLM have them, as a grammar of llguidance. Pure.

Owns what of them is known. Formats as in xgrammar 0.2 (`xgrammar/structural_tag.py`), and the older form with
`structures` and `triggers`. A text that names special tokens becomes these tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence

from llguidance import LLMatcher, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from nodeapi.grammars.hazards import check_lark
from nodeapi.grammars.limits import GrammarLimits

Format = Mapping[str, object]
_TEXT = r"/(?s:.*)/"
_NOTHING = '""'


def lark_source(text: str, limits: GrammarLimits) -> str:
    """The source for a matcher, of a grammar in Lark or GBNF. Raises ValueError for what is neither,
    InvalidRequestError for what may take too long."""
    try:
        lark = any_to_lark(text)
    except Exception as error:  # that conversion raises bare ones
        raise ValueError(f"as GBNF it cannot be read: {error}") from error
    check_lark(lark, limits)
    return str(LLMatcher.grammar_from_lark(lark))


def tags_source(tag: Format, vocabulary: LLTokenizer, json_options: Mapping[str, object], limits: GrammarLimits) -> str:
    """The source for a matcher. `json_options`: llguidance's, of each JSON schema in it. Raises ValueError, KeyError
    and TypeError for what is no structural tag, or one of a kind that is not known."""
    lark = _Lark(vocabulary, json_options, limits)
    lark.add_start(lark.of(_current(tag)))
    if not lark.side:
        return lark.text
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": lark.text}, *lark.side]})


def _current(tag: Format) -> Format:
    """The format of a tag; of one in the older form what means the same."""
    if "structures" not in tag:
        return _mapping(tag["format"])
    tags = [
        {"begin": one["begin"], "content": {"type": "json_schema", "json_schema": one["schema"]}, "end": one["end"]}
        for one in map(_mapping, _list(tag["structures"]))
    ]
    return {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}


class _Lark:
    """Rules, made as they are needed. Each method gives an expression that may stand in another rule."""

    def __init__(self, vocabulary: LLTokenizer, json_options: Mapping[str, object], limits: GrammarLimits) -> None:
        self._vocabulary, self._limits = vocabulary, limits
        self._json_options = json_options
        self._rules: list[str] = []
        self.side: list[dict[str, str]] = []
        """Grammars that rules refer to by name."""

    @property
    def text(self) -> str:
        return "\n".join(["%llguidance {}", *reversed(self._rules), f"TEXT: {_TEXT}", ""])

    def add_start(self, expression: str) -> None:
        self._rules.append(f"start: {expression}")

    def of(self, form: Format) -> str:
        kind = str(form["type"])
        if kind not in FORMATS:
            raise ValueError(f"formats of type {kind!r} are not supported; there are {', '.join(FORMATS)}")
        if form.get("style", "json") != "json":
            raise ValueError(f"style of {kind} is not supported")
        unknown = form.keys() - _KNOWN[kind] - {"type"}
        if asked := [name for name in sorted(unknown) if form[name] not in (None, False, [])]:
            raise ValueError(f"{asked[0]} of {kind} is not supported")
        return FORMATS[kind](self, form)

    def literal(self, text: str) -> str:
        """Exactly `text`; empty for none."""
        parts: list[str] = []
        plain: list[int] = []
        for token in [*self._vocabulary.tokenize_str(text, parse_special=True), None]:
            if token is not None and not self._vocabulary.is_special_token(token):
                plain.append(token)
                continue
            if plain:
                parts.append(json.dumps(self._vocabulary.decode_str(plain)))
                plain = []
            if token is not None:
                parts.append(f"<[{token}]>")
        return " ".join(parts)

    def const_string(self, form: Format) -> str:
        return self.literal(str(form["value"])) or _NOTHING

    def json_schema(self, form: Format) -> str:
        schema = form["json_schema"]
        if schema is True or schema is None:
            schema = {}
        return "%json " + json.dumps({**_mapping(schema), "x-guidance": dict(self._json_options)})

    def regex(self, form: Format) -> str:
        return f"/{regex_to_lark(str(form['pattern']))}/"

    def grammar(self, form: Format) -> str:
        name = f"side_{len(self.side)}"
        self.side.append({"name": name, "lark_grammar": lark_source(str(form["grammar"]), self._limits)})
        return f"@{name}"

    def any_text(self, form: Format) -> str:
        return "TEXT"

    def sequence(self, form: Format) -> str:
        return " ".join(f"({self.of(part)})" for part in map(_mapping, _list(form["elements"])))

    def either(self, form: Format) -> str:
        return " | ".join(f"({self.of(part)})" for part in map(_mapping, _list(form["elements"])))

    def optional(self, form: Format) -> str:
        return f"({self.of(_mapping(form['content']))})?"

    def plus(self, form: Format) -> str:
        return f"({self.of(_mapping(form['content']))})+"

    def star(self, form: Format) -> str:
        return f"({self.of(_mapping(form['content']))})*"

    def tag(self, form: Format) -> str:
        return f"{self.literal(_text(form['begin']))} {self._behind(form)}"

    def _behind(self, form: Format) -> str:
        """The content of a tag and its end."""
        content, ends = _mapping(form["content"]), form["end"]
        texts = [_text(end) for end in (ends if isinstance(ends, list) else [ends])]
        if content["type"] != "any_text":
            ending = " | ".join(self.literal(end) or _NOTHING for end in texts)
            return f"({self.of(content)}) ({ending})"
        return " | ".join(self._up_to(end) for end in texts) if any(texts) else "TEXT"

    def _up_to(self, end: str) -> str:
        """Free text up to and with `end`, where it comes first."""
        literal = self.literal(end)
        if "<[" in literal:  # no text holds a special token
            return f"TEXT {literal}"
        return self._rule(f"TEXT {literal}", lazy=True)

    def triggered_tags(self, form: Format) -> str:
        triggers = [_text(trigger) for trigger in _list(form["triggers"])]
        tags = [_mapping(tag) for tag in _list(form["tags"])]
        behind: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for tag in tags:
            begin = _text(tag["begin"])
            found = next((trigger for trigger in triggers if trigger and begin.startswith(trigger)), None)
            if found is None:
                raise ValueError(f"the tag {begin!r} begins with none of the triggers")
            behind[found].append(f"{self.literal(begin[len(found) :])} {self._behind(tag)}")
        items = [f"{self._up_to(trigger)} ({' | '.join(rest)})" for trigger, rest in behind.items() if rest]
        any_item = f"({' | '.join(items)})"
        first = f"({' | '.join(self.tag(tag) for tag in tags)})"
        match bool(form.get("at_least_one")), bool(form.get("stop_after_first")):
            case True, True:
                return first
            case True, False:
                return f"{first} {any_item}* TEXT"
            case False, True:
                return f"{any_item} | TEXT"
        return f"{any_item}* TEXT"

    def tags_with_separator(self, form: Format) -> str:
        tag = f"({' | '.join(self.tag(_mapping(tag)) for tag in _list(form['tags']))})"
        several = tag
        if not form.get("stop_after_first"):
            several = f"{tag} ({self.literal(_text(form['separator']))} {tag})*"
        return several if form.get("at_least_one") else f"({several})?"

    def _rule(self, body: str, *, lazy: bool = False) -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' * lazy}: {body}")
        return name


FORMATS: dict[str, Callable[[_Lark, Format], str]] = {
    "const_string": _Lark.const_string,
    "json_schema": _Lark.json_schema,
    "regex": _Lark.regex,
    "grammar": _Lark.grammar,
    "any_text": _Lark.any_text,
    "sequence": _Lark.sequence,
    "or": _Lark.either,
    "optional": _Lark.optional,
    "plus": _Lark.plus,
    "star": _Lark.star,
    "tag": _Lark.tag,
    "triggered_tags": _Lark.triggered_tags,
    "tags_with_separator": _Lark.tags_with_separator,
}
_KNOWN: dict[str, frozenset[str]] = {
    "const_string": frozenset({"value"}),
    "json_schema": frozenset({"json_schema", "style"}),
    "regex": frozenset({"pattern"}),
    "grammar": frozenset({"grammar"}),
    "any_text": frozenset(),
    "sequence": frozenset({"elements"}),
    "or": frozenset({"elements"}),
    "optional": frozenset({"content"}),
    "plus": frozenset({"content"}),
    "star": frozenset({"content"}),
    "tag": frozenset({"begin", "content", "end"}),
    "triggered_tags": frozenset({"triggers", "tags", "at_least_one", "stop_after_first"}),
    "tags_with_separator": frozenset({"tags", "separator", "at_least_one", "stop_after_first"}),
}
"""The fields of each that are obeyed."""


def _mapping(value: object) -> Format:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is no object")
    return value


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{value!r} is no list of at least one")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
