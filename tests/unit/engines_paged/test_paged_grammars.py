"""Answers that follow a grammar, out of the simulated engine: batches, forks, continuations, ends and failures."""

import json

import jsonschema
import msgspec
import pytest
from support.engine_fakes import CONFIG, Cluster, completions, deltas, idle, lone_engine, prompt_of, request
from support.sim_loop import run_sim

from engines.sim.reference import expected_tokens
from engines.sim.runner import EOS_TOKEN
from kvcore.errors import FormStuckError, InvalidRequestError
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.messages import FinishReason

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 30}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
JSON = Grammar(kind=GrammarKind.JSON, text=json.dumps(SCHEMA), whitespace="")
DIGITS = Grammar(kind=GrammarKind.REGEX, text="[0-9]{5}")


def wanted(name, grammar, seed=0, **sampling):
    options = {"temperature": 1.0, "seed": seed, "ignore_eos": False, "max_tokens": 200, **sampling}
    made = request(name, prompt_of(50, seed), **options)
    return msgspec.structs.replace(made, sampling=msgspec.structs.replace(made.sampling, grammar=grammar))


def text_of(tokens):
    assert tokens[-1] == EOS_TOKEN
    return b"".join(bytes((token,)) if token < 256 else b" <%d>" % token for token in tokens[:-1]).decode()


def valid(tokens):
    jsonschema.validate(json.loads(text_of(tokens)), SCHEMA)


def run(act, config=CONFIG):
    async def main():
        async with lone_engine(config) as engine:
            found = await act(engine)
            await idle(engine)
            return found

    return run_sim(main)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"ignore_eos": True}, {"min_tokens": 199}])
def test_an_answer_ends_where_its_grammar_can_only_end(sampling):
    async def act(engine):
        return await deltas(engine, wanted("r", DIGITS, **sampling))

    found = run(act)
    tokens = [token for delta in found for token in delta.token_ids]
    assert text_of(tokens).isdigit() and len(tokens) == 6
    assert found[-1].finish_reason is FinishReason.STOP and found[-1].stop_token_id == EOS_TOKEN


@pytest.mark.parametrize("seed", range(4))
def test_those_with_and_without_a_grammar_share_steps_and_do_not_touch_each_other(seed):
    plain = [wanted(f"p{number}", None, seed + number, max_tokens=40) for number in range(3)]

    async def act(engine):
        import asyncio

        grammars = [wanted(f"g{number}", JSON, seed + number) for number in range(3)]
        return await asyncio.gather(*[completions(engine, one) for one in [*plain, *grammars]])

    found = run(act)
    for one, (tokens,) in zip(plain, found[:3], strict=True):
        assert [tokens] == expected_tokens(CONFIG, one.prompt_token_ids, one.sampling)
    for (tokens,) in found[3:]:
        valid(tokens)


def test_each_of_several_completions_has_a_place_of_its_own():
    async def act(engine):
        return await completions(engine, wanted("r", JSON, n=4))

    found = run(act)
    assert len({tuple(tokens) for tokens in found}) > 1
    for tokens in found:
        valid(tokens)


def test_one_that_is_preempted_is_where_it_was():
    async def act(engine):
        import asyncio

        return await asyncio.gather(*[completions(engine, wanted(f"r{seed}", JSON, seed)) for seed in range(6)])

    tight = msgspec.structs.replace(CONFIG, num_blocks=24, max_context=160)
    roomy = run(act)
    assert run(act, tight) == roomy
    for (tokens,) in roomy:
        valid(tokens)


def free_then(grammar, seed, *, opens):
    """`grammar` behind the 20 tokens that come where nothing is asked, the first of which may open what is free."""
    plain = wanted("r", None, seed, max_tokens=20, ignore_eos=True)
    ((*tokens, last),) = expected_tokens(CONFIG, plain.prompt_token_ids, plain.sampling)
    assert last not in tokens
    return msgspec.structs.replace(grammar, after=((last,),), opening=tuple(tokens[:1]) if opens else ())


@pytest.mark.parametrize("grammar", [JSON, free_then(JSON, 3, opens=False), free_then(JSON, 3, opens=True)])
def test_an_answer_goes_on_inside_the_grammar_wherever_it_was_cut(grammar):
    whole = wanted("r", grammar, seed=3)

    async def first(engine):
        return await completions(engine, whole)

    (tokens,) = run(first)
    for cut in range(1, len(tokens), max(1, len(tokens) // 12)):

        async def rest(engine, cut=cut):
            return await completions(engine, msgspec.structs.replace(whole, output_token_ids=tokens[:cut]))

        assert run(rest) == [tokens]


def test_what_is_reasoned_before_is_free_and_what_comes_after_is_not():
    async def act(engine):
        grammar = free_then(DIGITS, 1, opens=False)
        return await completions(engine, wanted("r", grammar, seed=1, ignore_eos=True))

    (tokens,) = run(act)
    assert text_of(tokens[20:]).isdigit() and len(tokens) == 20 + 6


def test_an_answer_that_does_not_open_with_reasoning_follows_the_grammar_at_once():
    grammar = msgspec.structs.replace(DIGITS, after=((400,),), opening=(401, 402))

    async def act(engine, seed):
        return await completions(engine, wanted("r", grammar, seed, max_tokens=900, ignore_eos=True))

    found = [run(lambda engine, seed=seed: act(engine, seed))[0] for seed in range(40)]
    opened = [tokens for tokens in found if tokens[0] == 401]
    assert opened and all(tokens[1] == 402 for tokens in opened)
    assert all(text_of(tokens).isdigit() for tokens in found if tokens[0] != 401)


def test_a_stop_token_ends_only_where_the_grammar_may():
    five = ord("5")

    async def act(engine):
        grammar = Grammar(kind=GrammarKind.REGEX, text="5{3}5*")
        return await deltas(engine, wanted("r", grammar, stop_token_ids=[five, 300], max_tokens=30))

    # Until three are there, "5" is the grammar's only token and yet would end it: nothing can come.
    with pytest.raises(FormStuckError, match="no token that could come next"):
        run(act)

    async def other(engine):
        return await completions(engine, wanted("r", DIGITS, stop_token_ids=[300, five]))

    (tokens,) = run(other)
    assert five not in tokens[:-1] and len(tokens) == 6 and tokens[-1] in (EOS_TOKEN, 300, five)


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        (GrammarKind.REGEX, "[", "regex"),
        (GrammarKind.JSON, '{"type": "nothing"}', "Invalid type"),
        (GrammarKind.JSON, '{"$ref": "#"}', "no text can follow it"),
    ],
)
def test_a_grammar_that_is_none_is_refused_before_any_token(kind, text, why):
    async def act(engine):
        return await deltas(engine, wanted("r", Grammar(kind=kind, text=text)))

    with pytest.raises(InvalidRequestError, match=why):
        run(act)


def test_tokens_that_do_not_follow_the_grammar_are_not_continued():
    async def act(engine):
        started = msgspec.structs.replace(wanted("r", DIGITS), output_token_ids=[ord("x")])
        return await deltas(engine, started)

    with pytest.raises(FormStuckError, match="does not follow the grammar"):
        run(act)


def test_another_engine_goes_on_as_the_first_would_have():
    async def main():
        cluster = Cluster()
        async with cluster.engine("a") as first, cluster.engine("b") as second:
            whole = wanted("r", JSON, seed=5)
            (tokens,) = await completions(first, whole)
            half = msgspec.structs.replace(whole, output_token_ids=tokens[: len(tokens) // 2])
            assert await completions(second, half) == [tokens]
            valid(tokens)
        await cluster.aclose()

    run_sim(main)
