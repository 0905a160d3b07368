"""Answers in a form and loops of tools whose decoders die in the middle, seed by seed: valid to the last byte.

The router is the production one, from HTTP to its ledger; engines are the simulated ones. Each answer must be the one
that comes where nobody dies.
"""

import json
import random

import jsonschema
import pytest
from support.grammar_cluster import grammar_cluster
from support.sim_loop import run_sim
from support.slow import seeds, slow_but

from router.parsing.dialects import DIALECTS

QUICK, MANY = range(4), range(4, 4 + seeds(96))
PARSERS = [name for name, dialect in DIALECTS.items() if dialect.form is not None and dialect.form.before is None]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Zürich", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
HELD = {"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}}


async def answer(cluster, messages):
    """One in a form, its text."""
    choice = await cluster.ask(messages=messages, temperature=1.0, seed=len(messages), **HELD)
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)
    return choice["message"]["content"]


async def loop_of_tools(cluster, messages):
    """A call that must be made, and the answer behind what came of it."""
    made = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    choice = await cluster.ask(messages=messages, temperature=1.0, seed=1, **made)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    jsonschema.validate(arguments, CITY)
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(arguments)}
    return call["function"]["arguments"], await answer(cluster, [*messages, called, result])


async def survives(parser, block):
    """How many streams broke off."""
    died = 0
    async with grammar_cluster(parser) as cluster:
        for seed in block:
            draw = random.Random(seed)
            ask = draw.choice([answer, loop_of_tools])
            messages = [{"role": "user", "content": f"Who is number {seed}?"}]
            cluster.deaths.clear()
            peaceful = await ask(cluster, messages)
            cluster.deaths.extend(planned := [draw.randint(1, 70) for _ in range(draw.randint(1, 3))])
            assert await ask(cluster, messages) == peaceful, f"seed {seed}, deaths {planned}"
            died += len(planned) - len(cluster.deaths)
    return died


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("block", slow_but([QUICK], [QUICK, MANY]), ids=["quick", "many"])
def test_what_is_held_to_a_form_survives_its_decoders(parser, block):
    assert run_sim(lambda: survives(parser, block)) > len(block) / 2
