"""A template that does not end, or grows without bound, costs its request; real ones come nowhere near the bounds."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import InvalidRequestError
from router.requests.spec import ChatPrompt
from router.text.chat_template import STEPS, ChatTemplate
from router.text.template_sandbox import StepBudget, TemplateEnvironment, TemplateTooBigError, limited_steps
from tests.support.conversations import CALLING, TEMPLATES, TOOL, USER

CHAT = ChatPrompt([{"role": "user", "content": "hi"}])
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for a in range(9999) %}{% for b in range(9999) %}{{ loop.index }}{% endfor %}{% endfor %}",
    "recursive loops": '{% for x in "ab" recursive %}{% if loop.depth < 60 %}{{ loop("ab") }}{% endif %}{% endfor %}',
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "output": "{% set x = 'x' * 100000 %}{% for a in range(99999) %}{{ x }}{% endfor %}",
}
DOUBLED = "{{% set ns = namespace(x='x') %}}{{% for a in range(99) %}}{}{{% endfor %}}"
GROWING = {
    "concatenated": DOUBLED.format("{% set ns.x = ns.x ~ ns.x %}"),
    "added": DOUBLED.format("{% set ns.x = ns.x + ns.x %}"),
    "in a list": DOUBLED.format("{% set ns.x = [ns.x[0] + ns.x[0]] %}"),
    "in an object": DOUBLED.format("{% set ns.x = {'a': ns.x.a ~ ns.x.a ~ 'x'} %}"),
    "two at once": DOUBLED.format("{% set ns.x, ns.y = ns.x + ns.x, ns.x + ns.x %}"),
    "by arguments": "{% macro f(x) %}{{ f([x[0] ~ x[0]]) }}{% endmacro %}{{ f('x') }}",
    "multiplied": DOUBLED.format("{% set ns.x = ns.x * 9 %}"),
    "in a block": DOUBLED.format("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "joined": DOUBLED.format("{% set ns.x = [ns.x, ns.x] | join %}"),
    "formatted": DOUBLED.format("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "by a method": DOUBLED.format("{% set ns.x = ns.x.replace('x', 'xx') %}"),
    "by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLED.format("{% set ns.x = f(ns.x) %}"),
    "a list": DOUBLED.replace("'x'", "[1]").format("{% set ns.x = ns.x + ns.x %}"),
    "replaced": "{% set x = 'x' * 99999 %}{% set y = x.replace('x', x) %}",
    "joined by": "{% set x = 'x' * 99999 %}{% set y = x.join(x) %}",
    "at once": "{{ 'x' * 9999999999 }}",
    "from the left": "{{ 9999999999 * 'x' }}",
    "padded": "{{ 'x'.ljust(9999999999) }}",
    "centred": "{{ 'x' | center(9999999999) }}",
    "indented": "{{ [1] | tojson(indent=9999999999) }}",
    "a power": "{{ 9 ** 99999999 }}",
}


@pytest.mark.parametrize("source", (ENDLESS | GROWING).values(), ids=(ENDLESS | GROWING).keys())
def test_a_template_without_bounds_is_stopped(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="does too much for these messages") as caught:
        ChatTemplate(source, {}, steps=10_000).render(CHAT)
    assert caught.value.param == "messages"


async def test_what_one_template_spends_is_not_the_next_ones() -> None:
    modest = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}", {})
    greedy = ChatTemplate(ENDLESS["loops"], {}, steps=10_000)
    results = await asyncio.gather(
        *(asyncio.to_thread(template.render, CHAT) for template in (greedy, modest) * 2), return_exceptions=True
    )
    assert results[1::2] == ["user", "user"] and all(isinstance(error, InvalidRequestError) for error in results[::2])


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_take_a_small_part_of_the_steps(name: str, tmp_path: Path) -> None:
    answer = {"role": "tool", "content": "x" * 1000, "tool_call_id": "abcdef123"}
    messages = [USER, *([CALLING, answer] * 100), {"role": "assistant", "content": "x" * 1000}, USER]
    environment = TemplateEnvironment()
    values: dict[str, Any] = {"bos_token": "", "eos_token": "", "messages": messages, "tools": [TOOL] * 50}
    with limited_steps(STEPS // 8) as budget:
        try:
            environment.from_string(TEMPLATES[name]).render(values)
        except TemplateTooBigError:
            raise
        except Exception as error:
            assert "alternate" in str(error) or "Only user" in str(error), error
    assert repr(budget).startswith("<StepBudget left=")


def test_large_numbers_of_messages_and_tools_are_no_widths() -> None:
    source = """{% macro f(n) %}{{ n }}{% endmacro %}
{{ f(n) }} {{ n | string }} {{ n | tojson }} {{ '{}'.format(n) }} {{ x | default(n) }}"""
    chat = ChatPrompt(CHAT.messages, template_values={"n": 1_700_000_000})
    assert ChatTemplate(source, {}).render(chat) == " ".join(["1700000000"] * 5)


def test_bounds_change_nothing_of_loops() -> None:
    source = """{% for x in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ loop.revindex }}{{ loop.last }}
{{ loop.previtem }}{{ loop.nextitem }}{% if x == 2 %}{% continue %}{% endif %};{% else %}none{% endfor %}
{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}{% for x in missing %}{% else %}none{% endfor %}
{% for x in [3, 1] | sort if x > 1 %}{{ x }}{% endfor %}{% for x in [[1, []]] recursive %}{{ x }}{% endfor %}"""
    plain = TemplateEnvironment.__mro__[1](trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert ChatTemplate(source, {}).render(CHAT) == plain.from_string(source).render()


def test_the_sandbox_gives_no_way_out() -> None:
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(_a=1) }}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{{ dict.mro() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{% include 'x' %}",
    ):
        with pytest.raises(InvalidRequestError, match="refused it"):
            ChatTemplate(source, {}).render(CHAT)
    assert ChatTemplate("{{ dict(a=1) }}{{ dict.fromkeys([1]) }}", {}).render(CHAT) == "{'a': 1}{1: None}"


def test_a_budget_says_what_is_left() -> None:
    budget = StepBudget(3)
    budget.spend(2)
    assert repr(budget) == "<StepBudget left=1>"
