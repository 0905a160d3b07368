"""Random JSON schemas: what the simulated engine writes follows them, whoever goes on with it, and wherever.

A place in a grammar is read off the answer's tokens alone: at each cut a new matcher lets the same tokens through as
the one that has seen them one by one.
"""

import json
import random
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_fakes import CONFIG, deltas, idle, lone_engine, prompt_of, request
from support.grammar_walks import EOS, drawn_answer, matcher_of
from support.sim_loop import run_sim

from engines.sim.runner import EOS_TOKEN
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.messages import FinishReason
from router.text.tokenizer import ByteTokenizer

MAX_TOKENS = 900
AFTER, OPENING = ((60, 47, 62), (10,)), (60, 116, 62)
"""What ends and what begins free text before the form: `</>` or a newline, `<t>`."""

scalars: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-50, 0), st.integers(0, 50)).map(
        lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
    ),
    st.integers(0, 6).map(lambda most: {"type": "string", "maxLength": most}),
    st.just({"type": "string", "pattern": "^[a-c]{1,4}-[0-9]$"}),
    st.lists(st.sampled_from(["a", 'é"', 1, None, True, 2.5]), min_size=1, max_size=3, unique_by=repr).map(
        lambda options: {"enum": options}
    ),
    st.sampled_from(["x", 7]).map(lambda value: {"const": value}),
)


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.tuples(inner, st.integers(0, 2)).map(
        lambda made: {"type": "array", "items": made[0], "minItems": made[1] // 2, "maxItems": made[1]}
    )
    objects = st.dictionaries(st.sampled_from(["a", "b", "c d", "é"]), inner, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties)) if properties else st.nothing()).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    return arrays | objects | st.lists(inner, min_size=1, max_size=2).map(lambda ways: {"anyOf": ways})


schemas = st.recursive(scalars, nested, max_leaves=4)
seeds = st.integers(0, 1 << 30)


def grammar_of(schema: dict[str, Any], *, whitespace: str | None = "", reasons: bool = False) -> Grammar:
    form = Grammar(kind=GrammarKind.JSON, text=json.dumps(schema), whitespace=whitespace)
    return msgspec.structs.replace(form, after=AFTER, opening=OPENING) if reasons else form


def check_engine(schema: dict[str, Any], seed: int) -> None:
    made = request("r", prompt_of(20, seed), temperature=1.0, seed=seed, ignore_eos=False, max_tokens=MAX_TOKENS)
    made = msgspec.structs.replace(made, sampling=msgspec.structs.replace(made.sampling, grammar=grammar_of(schema)))

    async def asked(*output: int) -> list[int]:
        async with lone_engine() as engine:
            found = await deltas(engine, msgspec.structs.replace(made, output_token_ids=list(output)))
            await idle(engine)
        assert found[-1].finish_reason == FinishReason.STOP
        return [token for delta in found for token in delta.token_ids]

    whole = run_sim(asked)
    assert whole[-1] == EOS_TOKEN
    jsonschema.validate(json.loads(ByteTokenizer(CONFIG.vocab_size).decode(whole[:-1])), schema)
    cut = random.Random(seed).randrange(len(whole))
    assert whole[:cut] + run_sim(lambda: asked(*whole[:cut])) == whole


def check_place(schema: dict[str, Any], seed: int, thought: str) -> None:
    grammar = grammar_of(schema, whitespace=None, reasons=bool(thought))
    text = thought + drawn_answer(grammar_of(schema, whitespace=None), random.Random(seed), ['"'])
    first, output = matcher_of(grammar), list(text.encode())
    for cut in range(len(output) + 1):
        seen, anew = first.mask(output[:cut], [EOS]), first.fork().mask(output[:cut], [EOS])
        assert (seen is None) == (anew is None) and not first.problem, (text, cut)
        if seen is not None and anew is not None:
            assert np.array_equal(seen, anew), (text, cut)
            assert seen[output[cut] if cut < len(output) else EOS], (text, cut)


thoughts = st.sampled_from(["", "<t>\n", "<t>{</>", "<t></"]).map(lambda text: text + ">" * text.endswith("/"))


@settings(max_examples=30)
@given(schemas, seeds)
def test_what_the_engine_writes_follows_its_schema_whoever_goes_on_with_it(schema: dict[str, Any], seed: int) -> None:
    check_engine(schema, seed)


@settings(max_examples=30)
@given(schemas, seeds, thoughts)
def test_at_each_cut_the_place_is_that_of_who_has_seen_all(schema: dict[str, Any], seed: int, thought: str) -> None:
    check_place(schema, seed, thought)


@pytest.mark.slow
@settings(max_examples=200)
@given(schemas, seeds, thoughts)
def test_more_of_both(schema: dict[str, Any], seed: int, thought: str) -> None:
    check_engine(schema, seed)
    check_place(schema, seed, thought)
