"""`stop_reason`: what of the client's own ended an answer, as vLLM says it."""

import json
from typing import Any

import httpx
import pytest
from support.router_fakes import make_rig

WORDS = "one two three"


async def last_choice(path: str, *, stream: bool, **fields: object) -> dict[str, Any]:
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.tokens = lambda tokens, _: [*WORDS.encode(), 0][len(tokens) - bytes(tokens).rfind(b">") - 1]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://router") as http:  # type: ignore[arg-type]
        prompt = {"prompt": "say>"} if "chat" not in path else {"messages": [{"role": "user", "content": "say"}]}
        body = {**prompt, "max_tokens": len(WORDS) + 1, "stop_token_ids": [0], "stream": stream, **fields}
        reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    events = [json.loads(event[6:]) for event in reply.text.split("\n\n")[:-2]] if stream else [reply.json()]
    choices = [choice for event in events for choice in event["choices"]]
    assert ["stop_reason" in choice for choice in choices] == [
        choice["finish_reason"] is not None for choice in choices
    ]
    return choices[-1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "finish", "wanted"),
    [
        ({"stop": ["two", "wo"]}, "stop", "two"),
        ({"stop": "nowhere"}, "stop", 0),
        ({"max_tokens": 3}, "length", None),
        ({"stop_token_ids": [ord("t"), 0]}, "stop", ord("t")),
    ],
)
async def test_it_is_the_string_or_the_token(
    fields: dict[str, object], finish: str, wanted: object, path: str, stream: bool
) -> None:
    choice = await last_choice(path, stream=stream, **fields)
    assert (choice["finish_reason"], choice["stop_reason"]) == (finish, wanted)
