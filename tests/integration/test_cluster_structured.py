"""Answers held to a form by real processes: whole and streamed, and over the death of a decoder in the middle."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.cluster import ClusterHandle, cluster

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


async def in_mid_answer(subject: ClusterHandle) -> dict[str, Any] | None:
    records = (await subject._json(f"{subject.url}/v1/requests"))["requests"]
    return records[0] if records and records[0]["ttft_s"] is not None else None


async def test_a_form_is_kept_to_over_a_decoders_death(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Names, please."}]
    fields = {"response_format": FORMAT, "max_tokens": 400, "seed": 5}
    async with cluster(tmp_path, overrides=("engine.inter_token_s=0.03",)) as subject:
        task = asyncio.create_task(subject.stream_chat(messages, **fields))
        record = await subject.until(lambda: in_mid_answer(subject), 20)
        assert record is not None
        os.kill(subject.launcher.pids[record["route"]["decoder"]], signal.SIGKILL)
        answer = await task
        told = await subject.explain(answer.id)
        assert told["retries"] == 1, "nobody took it over: the test shows nothing"
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
