"""Calls that must be made, out of the simulated engine, and gone on with by another one from any token on."""

import json

import jsonschema
import msgspec
import pytest
from support.engine_fakes import deltas, idle, lone_engine, prompt_of, request
from support.sim_loop import run_sim
from support.slow import slow_but

from engines.sim.runner import EOS_TOKEN
from router.parsing.call_forms import forced_arguments, forced_calls
from router.parsing.dialects import DIALECTS, AnswerParser, Dialect
from router.parsing.events import CallArguments, CallBegin, CallEnd, Content
from router.parsing.forced import ForcedParser

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 3, "maxLength": 9}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
SCHEMAS = {"feed": SCHEMA}
HERMES, LLAMA = DIALECTS["hermes"], DIALECTS["llama3_json"]
WAYS = {
    "hermes": (forced_calls(HERMES.form, SCHEMAS, one=True), lambda: AnswerParser(HERMES, SCHEMAS, "")),
    "llama": (forced_calls(LLAMA.form, SCHEMAS, one=True), lambda: AnswerParser(LLAMA, SCHEMAS, "")),
    "list": (forced_calls(None, SCHEMAS, one=True), lambda: ForcedParser(Dialect(), "", "")),
    "arguments": (forced_arguments(SCHEMA), lambda: ForcedParser(Dialect(), "feed", "")),
}


def call_of(tokens, parser):
    """Read a token at a time, as a stream is."""
    assert tokens[-1] == EOS_TOKEN
    read = b"".join(bytes((token,)) if token < 256 else b" <%d>" % token for token in tokens[:-1]).decode()
    events = [event for character in read for event in parser.feed(character)] + parser.end()
    assert not [event for event in events if isinstance(event, Content)]
    assert [type(events[0]), type(events[-1])] == [CallBegin, CallEnd] and events[0].name == "feed"
    return json.loads("".join(event.text for event in events if isinstance(event, CallArguments)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", slow_but([0], range(3)))
def test_a_call_is_the_same_whoever_goes_on_with_it_and_valid_to_its_last_byte(way, seed):
    grammar, parser = WAYS[way]
    made = request("r", prompt_of(50, seed), temperature=1.0, seed=seed, ignore_eos=False, max_tokens=400)
    made = msgspec.structs.replace(made, sampling=msgspec.structs.replace(made.sampling, grammar=grammar))

    async def asked(*output):
        async with lone_engine() as engine:
            found = await deltas(engine, msgspec.structs.replace(made, output_token_ids=list(output)))
            await idle(engine)
        return [token for delta in found for token in delta.token_ids]

    whole = run_sim(asked)
    jsonschema.validate(call_of(whole, parser()), SCHEMA)
    for cut in (1, len(whole) // 3, len(whole) // 2, len(whole) - 2):
        assert whole[:cut] + run_sim(lambda cut=cut: asked(*whole[:cut])) == whole
