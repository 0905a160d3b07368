"""The grammars of calls that must be made, in vLLM's own library: what it lets through is what the other engines do."""

import pytest
import xgrammar
from support.call_texts import written

from router.parsing.call_forms import forced_calls, strict_calls
from router.parsing.dialects import DIALECTS

CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Zürich", "Rome"]},
        "days": {"type": "array", "items": {"type": "integer"}},
        "note": {"type": "string"},
    },
    "required": ["city"],
}
SCHEMAS = {"get_weather": CITY, "now": {}}
FORMS = {name: dialect.form for name, dialect in DIALECTS.items() if dialect.form is not None}


def lets(grammar: xgrammar.Grammar, text: str) -> bool:
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[256])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_grammar(grammar))
    return bool(matcher.accept_string(text)) and bool(matcher.accept_token(256))


@pytest.mark.parametrize("name", FORMS)
def test_calls_in_a_models_own_form(name: str) -> None:
    form, rome = FORMS[name], ("get_weather", {"city": "Rome", "days": [1, 2], "note": "a <b>\n</c>"})
    one_call, several = written(name, [rome]), written(name, [rome, ("now", {})])
    forced = xgrammar.Grammar.from_structural_tag(forced_calls(form, SCHEMAS, one=False).text)
    one = xgrammar.Grammar.from_structural_tag(forced_calls(form, SCHEMAS, one=True).text)
    assert lets(forced, one_call) and lets(one, one_call)
    assert lets(forced, several) == (form.separator is not None)
    assert form.separator is None or not lets(one, several)
    for wrong in ("It rains.", one_call.replace("Rome", "Paris"), one_call.replace("get_weather", "other")):
        assert not lets(forced, wrong), wrong
    assert not lets(forced, one_call[:-1])
    if form.before is not None:
        thought = "<|channel|>analysis<|message|>Rome?<|end|><|start|>assistant"
        assert lets(forced, thought + one_call) and not lets(forced, thought)
        return
    strict = xgrammar.Grammar.from_structural_tag(strict_calls(form, SCHEMAS, one=False).text)
    assert lets(strict, "It rains.") and lets(strict, f"Look: {one_call}") and lets(strict, several)
    assert not lets(strict, one_call.replace("Rome", "Paris"))
    alone = xgrammar.Grammar.from_structural_tag(strict_calls(form, SCHEMAS, one=True).text)
    assert lets(alone, f"Look: {one_call}") and not lets(alone, several) and not lets(alone, f"{one_call} It rains.")


def test_a_list_of_calls() -> None:
    text = '[{"name": "get_weather", "parameters": {"city": "Rome"}}, {"name": "now", "parameters": {}}]'
    grammar = xgrammar.Grammar.from_json_schema(forced_calls(None, SCHEMAS, one=False).text)
    assert lets(grammar, text) and not lets(grammar, text.replace("Rome", "Paris")) and not lets(grammar, "[]")
    one = xgrammar.Grammar.from_json_schema(forced_calls(None, SCHEMAS, one=True).text)
    assert not lets(one, text) and lets(one, '[{"name": "now", "parameters": {}}]')
