"""Answers held to a form by real processes: whole and streamed, and over the death of a decoder in the middle."""

import json
from pathlib import Path

import jsonschema
import pytest
from support.cluster import cluster
from support.mid_answer import killed_at_work

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {
        "names": {
            "type": "array",
            "items": {"type": "string", "minLength": 4, "maxLength": 12},
            "minItems": 5,
            "maxItems": 5,
        },
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
    },
    "required": ["names", "kind", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}


def is_right(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


async def test_a_form_is_kept_to_over_a_decoders_death(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Names, please."}]
    fields = {"response_format": FORMAT, "max_tokens": 400, "seed": 5}
    async with cluster(tmp_path, overrides=("engine.inter_token_s=0.03",)) as subject:
        told = await killed_at_work(subject, lambda: subject.stream_chat(messages, **fields))
        answer = told.answer
        assert told.after["retries"] == 1
        assert is_right(answer.text) and answer.finish_reason == "stop"
        again = await subject.chat(messages, **fields)
        assert again["choices"][0]["message"]["content"] == answer.text, "no death, the same answer"
        several = await subject.chat(messages, **{**fields, "n": 3})
        assert all(is_right(choice["message"]["content"]) for choice in several["choices"])


async def test_each_form_reaches_the_engine_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    async with cluster(tmp_path) as subject:
        for outputs, right in [
            ({"regex": "[0-9]{4}-[0-9]{2}"}, lambda text: text[:4].isdigit() and len(text) == 7),
            ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
            ({"grammar": 'start: "a" /[0-9]{3}/'}, lambda text: text[0] == "a" and text[1:].isdigit()),
            ({"json": SCHEMA, "disable_any_whitespace": True}, is_right),
        ]:
            reply = await subject.complete("x", structured_outputs=outputs, max_tokens=300)
            assert right(reply["choices"][0]["text"]), (outputs, reply)
            assert reply["choices"][0]["finish_reason"] == "stop"
        body = {"model": subject.config.model.name, "prompt": "x", "structured_outputs": {"regex": "["}}
        status, _, error = await subject.post("/v1/completions", body)
        assert (status, error["error"]["param"]) == (400, "structured_outputs.regex")
