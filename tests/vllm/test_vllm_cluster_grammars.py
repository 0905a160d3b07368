"""Forms of answers with vLLM's engines: held to through the cluster, and where an answer goes on at another engine."""

import inspect
import json
import re

import httpx
import jsonschema
import pytest
from support.cluster import ClusterHandle
from support.delta_readers import deltas_of
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from engines.vllm.placed_grammar import PlacedGrammar
from nodeapi.client import HttpNodeClient
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.messages import GenerateRequest
from nodeapi.sampling import SamplingParams

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]
PROMPT = [(7 * number) % 200 + 3 for number in range(90)]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


async def test_what_is_replaced_in_vllm_is_what_it_has() -> None:
    assert list(inspect.signature(StructuredOutputManager._create_grammar).parameters) == ["self", "request"]
    missing = StructuredOutputGrammar.__abstractmethods__ - set(vars(PlacedGrammar))
    assert not missing, "a placed grammar is asked for these, too"


async def test_an_answer_has_the_form_that_was_asked_for(subject: ClusterHandle) -> None:
    for temperature in (0, 1):
        fields = {"temperature": temperature, "seed": 5, "max_tokens": 900}
        told = await subject.complete(PROMPT, structured_outputs={"regex": "(ab|cd){20}"}, **fields)
        assert re.fullmatch("(ab|cd){20}", told["choices"][0]["text"])
    # Drawn: the model has learnt nothing, and its likeliest token may be a blank for ever.
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    answer = await subject.chat([{"role": "user", "content": "a pet"}], response_format=form, **fields)
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMA)


@pytest.mark.parametrize("after", [(), "!"], ids=["at once", "behind reasoning"])
async def test_an_engine_goes_on_inside_the_form_that_another_began(subject: ClusterHandle, after: str) -> None:
    """What was sent already is a part of the prompt to vLLM, whose form would begin anew."""
    async with httpx.AsyncClient(base_url=subject.url, timeout=60) as http:

        async def tokens_of(text: str) -> list[int]:
            asked = {"prompt": text, "add_special_tokens": False}
            return list((await http.post("/tokenize", json=asked)).json()["tokens"])

        begun = await tokens_of("some thoughts!abab" if after else "abab")
        marks = (tuple(await tokens_of(after)),) if after else ()
        wanted = GenerateRequest(
            request_id="goes-on",
            prompt_token_ids=PROMPT,
            output_token_ids=begun,
            sampling=SamplingParams(
                temperature=1.0,
                seed=3,
                max_tokens=200,
                grammar=Grammar(kind=GrammarKind.REGEX, text="(ab){10}", after=marks),
            ),
            deadline_s=60.0,
        )
        nodes = HttpNodeClient(connect_timeout_s=5, max_connections=2)
        try:
            deltas = await deltas_of(nodes, subject.node_url("decode-0"), wanted, timeout_s=60)
        finally:
            await nodes.aclose()
        more = [token for delta in deltas for token in delta.token_ids]
        asked = {"tokens": [*begun, *more]}
        text = (await http.post("/detokenize", json=asked)).json()["prompt"]
    assert re.sub("<[^>]*>$", "", text) == ("some thoughts!" if after else "") + "ab" * 10
