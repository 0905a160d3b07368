"""LMCache's file and environment -> a part of our cluster file, with a note for each key. Pure.

As in LMCache, a variable `LMCACHE_KEY` is laid over the file's `key`, and `LMCACHE_EXTRA_CONFIG` is JSON.
"""

import difflib
import json
from collections.abc import Mapping

from kvcore.config.yaml_text import YAMLTextError, read_yaml
from kvcore.errors import ConfigError
from kvferry.lmcache.draft import Draft, Fate, KeyNote
from kvferry.lmcache.keys import KeyRule, find_rule, known_keys

CONFIG_FILE = "LMCACHE_CONFIG_FILE"
_PREFIX = "LMCACHE_"


def is_spoken(environment: Mapping[str, str]) -> bool:
    """Whether the environment says anything to LMCache."""
    return any(name.startswith(_PREFIX) and value.strip() for name, value in environment.items())


def read_lmcache(text: str | None, environment: Mapping[str, str]) -> Draft:
    """`text` is the file's, None without one. Raises ConfigError where a text is not YAML or JSON at all."""
    given = {} if text is None else _file(text)
    given |= _variables(environment)
    extra = given.pop("extra_config", None)
    if isinstance(extra, str):
        extra = _json(extra)
    if extra is not None and not isinstance(extra, Mapping):
        raise ConfigError(f"extra_config: expected a mapping, it is {extra!r}")
    given |= {f"extra_config.{key}": value for key, value in (extra or {}).items()}
    if given and "PYTHONHASHSEED" in environment:
        given["PYTHONHASHSEED"] = environment["PYTHONHASHSEED"]
    draft = Draft(given)
    for key, value in given.items():
        draft.notes.append(_note(draft, key, value))
    return draft


def _note(draft: Draft, key: str, value: object) -> KeyNote:
    rule = find_rule(key)
    if rule is None:
        near = difflib.get_close_matches(key, known_keys(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return KeyNote(key, Fate.IGNORED, f"LMCache has no such key and ignores it{hint}")
    if value is None:
        return KeyNote(key, Fate.IGNORED, "empty")
    return KeyNote(key, *_taken(rule, draft, value))


def _taken(rule: KeyRule, draft: Draft, value: object) -> tuple[Fate, str]:
    remark = "; LMCache itself ignores this key" if rule.doubtful else ""
    try:
        fate, said = rule.take(draft, value)
    except ValueError as error:
        return Fate.REFUSED, f"{error}"
    return fate, said if "LMCache itself ignores" in said else said + remark


def _file(text: str) -> dict[str, object]:
    try:
        raw = read_yaml(text)
    except YAMLTextError as error:
        raise ConfigError(f"not valid YAML{error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError("expected LMCache's `key: value` lines")
    return {str(key): value for key, value in raw.items()}


def _variables(environment: Mapping[str, str]) -> dict[str, object]:
    """By key. Quotes around a value are not its own. An empty variable says nothing."""
    found: dict[str, object] = {}
    for name, value in environment.items():
        bare = value.strip()
        if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\"":
            bare = bare[1:-1]
        if name.startswith(_PREFIX) and name != CONFIG_FILE and bare.strip():
            found[name.removeprefix(_PREFIX).lower()] = bare
    return found


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"LMCACHE_EXTRA_CONFIG: not valid JSON: {error}") from None
