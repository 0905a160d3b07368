"""The grammars of calls that must be made, in vLLM's own library: what it lets through is what the other engines do."""

import pytest
import xgrammar

from router.parsing.call_forms import CallForm, forced_calls, strict_calls
from router.parsing.dialects import DIALECTS

CITY = {"type": "object", "properties": {"city": {"enum": ["Zürich", "Rome"]}}, "required": ["city"]}
SCHEMAS = {"get_weather": CITY, "now": {}}
FORMS = {name: dialect.form for name, dialect in DIALECTS.items() if dialect.form is not None}


def lets(grammar: xgrammar.Grammar, text: str) -> bool:
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[256])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_grammar(grammar))
    return bool(matcher.accept_string(text)) and bool(matcher.accept_token(256))


def call(form: CallForm, name: str, arguments: str) -> str:
    return f"{name.join(form.begin)}{arguments}{form.end}"


@pytest.mark.parametrize("name", FORMS)
def test_calls_in_a_models_own_form(name: str) -> None:
    form = FORMS[name]
    rome, now = call(form, "get_weather", '{"city": "Rome"}'), call(form, "now", "{}")
    forced = xgrammar.Grammar.from_structural_tag(forced_calls(form, SCHEMAS, one=False).text)
    one = xgrammar.Grammar.from_structural_tag(forced_calls(form, SCHEMAS, one=True).text)
    several = f"{rome}{form.separator or ''}{now}"
    assert lets(forced, rome) and lets(one, rome) and not lets(one, several)
    assert lets(forced, several) == (form.separator is not None)
    for wrong in ("It rains.", rome.replace("Rome", "Paris"), rome.replace("get_weather", "other"), rome[:-1]):
        assert not lets(forced, wrong), wrong
    if form.before is not None:
        thought = "<|channel|>analysis<|message|>Rome?<|end|><|start|>assistant"
        assert lets(forced, thought + rome) and not lets(forced, thought)
    if form.trigger:
        strict = xgrammar.Grammar.from_structural_tag(strict_calls(form, SCHEMAS).text)
        assert lets(strict, "It rains.") and lets(strict, f"Look: {rome}")
        assert not lets(strict, rome.replace("Rome", "Paris"))


def test_a_list_of_calls() -> None:
    text = '[{"name": "get_weather", "parameters": {"city": "Rome"}}, {"name": "now", "parameters": {}}]'
    grammar = xgrammar.Grammar.from_json_schema(forced_calls(None, SCHEMAS, one=False).text)
    assert lets(grammar, text) and not lets(grammar, text.replace("Rome", "Paris")) and not lets(grammar, "[]")
    one = xgrammar.Grammar.from_json_schema(forced_calls(None, SCHEMAS, one=True).text)
    assert not lets(one, text) and lets(one, '[{"name": "now", "parameters": {}}]')
