"""Arguments of a call that a model wrote without JSON's quotes, as JSON."""

import json
import re
from collections.abc import Mapping

from router.parsing.reader import read_json

ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
"""Of a tag: its name and its value."""
_WORDS = {"True": True, "False": False, "None": None}


class Arguments:
    """The JSON text of arguments that come one after the other."""

    def __init__(self, schema: Mapping[str, object] | None) -> None:
        properties = (schema or {}).get("properties")
        self._properties: Mapping[str, object] = properties if isinstance(properties, Mapping) else {}
        self._before = "{"

    def is_text(self, key: str) -> bool:
        """Whether its value is a string, by what was said of the tool."""
        return value_kinds(self._properties.get(key)) == {"string"}

    def key(self, key: str) -> str:
        """What stands before a value."""
        before, self._before = self._before, ", "
        return f"{before}{json.dumps(key, ensure_ascii=False)}: "

    def value(self, key: str, text: str) -> str:
        """A whole value."""
        kinds = value_kinds(self._properties.get(key))
        if "string" in kinds and ("null" not in kinds or text.strip() != "null"):
            return json.dumps(text, ensure_ascii=False)
        return as_json(text.strip(), text)

    def end(self) -> str:
        """What stands after the last."""
        return "{}" if self._before == "{" else "}"


def as_json(text: str, otherwise: str) -> str:
    """Raw JSON as it is; anything else as a string of `otherwise`."""
    value = read_json(text)
    if value is text:
        return json.dumps(_WORDS.get(text, otherwise), ensure_ascii=False)
    return text if not isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def ends_in_string(text: str) -> bool:
    """Whether it is the beginning of a JSON object or list and breaks off within a string."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False


def value_kinds(schema: object) -> set[str]:
    """The types that it names. Empty: it says nothing of them, or not here."""
    if not isinstance(schema, Mapping):
        return set()
    kinds: set[str] = set()
    given = schema.get("type")
    kinds.update(one for one in (given if isinstance(given, list) else [given]) if isinstance(one, str))
    for way in ("anyOf", "oneOf"):
        options = schema.get(way)
        for option in options if isinstance(options, list) else []:
            kinds |= value_kinds(option)
    options = schema.get("enum")
    if not kinds and isinstance(options, list) and all(isinstance(one, str) for one in options):
        kinds.add("string")
    return kinds
