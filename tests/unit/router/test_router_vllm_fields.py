"""Fields of vLLM's that nodes or the router itself obey: what the engine is asked, and what comes of it."""

import json
from typing import Any

import httpx
import pytest
from support.router_fakes import Rig, make_rig

from router.text.repetition import Repetition, RepetitionWatch

RULE = {"max_pattern_size": 3, "min_count": 2, "min_pattern_size": 2}
PATHS = pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])


async def asked(path: str, rig: Rig | None = None, **fields: object) -> tuple[httpx.Response, Rig]:
    rig = rig or await make_rig()
    prompt = {"prompt": "say>"} if "chat" not in path else {"messages": [{"role": "user", "content": "say"}]}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://router") as http:  # type: ignore[arg-type]
        return await http.post(path, json={**prompt, "max_tokens": 6, "temperature": 0, **fields}), rig


async def rig_saying(text: str) -> Rig:
    """Its nodes write `text` after the prompt, whose last byte is `>`."""
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.tokens = lambda tokens, _: text.encode()[len(tokens) - bytes(tokens).rfind(b">") - 1]
    return rig


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    return [json.loads(event[6:]) for event in reply.text.split("\n\n")[:-2]]


def texts_of(events: list[dict[str, Any]]) -> list[str]:
    choices = [choice for event in events for choice in event["choices"]]
    return [text for choice in choices if (text := choice.get("text", choice.get("delta", {}).get("content")))]


def refusal_of(reply: httpx.Response) -> str:
    assert reply.status_code == 400, reply.text
    return str(reply.json()["error"]["param"])


@PATHS
async def test_the_engine_is_asked_for_allowed_tokens_and_for_none_of_the_bad_words(path: str) -> None:
    xargs: dict[str, object] = {"a": 1, "b": ["x", 2.5]}
    fields = {"allowed_token_ids": [98, 97, 98], "bad_words": ["ab", "c", "ab"], "vllm_xargs": xargs}
    reply, rig = await asked(path, **fields)
    assert reply.status_code == 200, reply.text
    ((sampling,),) = [[request.sampling for request in node.generates] for node in rig.nodes.nodes if node.generates]
    assert sampling.allowed_token_ids == [97, 98]
    assert sampling.bad_words == ["ab", "c", "ab"]
    assert sampling.bad_words_token_ids == [[97, 98], [99]], "after a blank they have a token more"
    assert sampling.extra_args == {"a": 1, "b": ["x", 2.5]}
    assert sampling.asks == {"allowed_token_ids", "bad_words", "bad_words_token_ids", "extra_args"}


@PATHS
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [512]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"bad_words": ["x" * (16 << 10), "y"]}, "bad_words"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"vllm_xargs": {"a": {"b": 1}}}, "vllm_xargs[...]"),
        ({"priority": 1 << 63}, "priority"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"repetition_detection": {"max_pattern_size": 2}}, "repetition_detection"),
        ({"repetition_detection": RULE | {"min_pattern_size": 4}}, "repetition_detection"),
        ({"repetition_detection": RULE | {"max_pattern_size": 1025}}, "repetition_detection"),
    ],
)
async def test_what_they_may_not_be_is_refused_by_name(path: str, fields: dict[str, object], param: str) -> None:
    reply, rig = await asked(path, **fields)
    assert refusal_of(reply) == param
    assert not any(node.generates for node in rig.nodes.nodes)


@PATHS
@pytest.mark.parametrize("fields", [{"thinking_token_budget": 5}, {"vllm_xargs": {"a": 1}}])
async def test_engines_that_cannot_are_not_asked_and_the_client_is_told_its_own_name(path: str, fields: Any) -> None:
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.lacks = ["extra_args", "thinking_token_budget"]
    await rig.prober.probe()
    reply, _ = await asked(path, rig, **fields)
    assert refusal_of(reply) == next(iter(fields))


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_the_clients_request_id_names_the_answer_and_its_record_stays_ours(path: str, stream: bool) -> None:
    rig = await make_rig()
    ids = set()
    for _ in range(2):
        reply, _ = await asked(path, rig, request_id="mine", stream=stream)
        bodies = events_of(reply) if stream else [reply.json()]
        name = "chatcmpl-mine" if "chat" in path else "cmpl-mine"
        assert {body["id"] for body in bodies} == {name}
        ids |= {record.id for record in rig.log.newest()}
        found = rig.log.find(name)
        assert found is not None and (found.id, found.answer_id) == (rig.log.newest()[0].id, name)
    assert len(ids) == 2, "two requests of one name are two"


@PATHS
async def test_the_prompts_text_is_shown_to_chats_that_ask(path: str) -> None:
    reply, _ = await asked(path, return_prompt_text=True)
    if "chat" not in path:
        assert refusal_of(reply) == "return_prompt_text"
        return
    assert reply.json()["prompt_text"] == "<user>say\n<assistant>"
    reply, _ = await asked(path, return_prompt_text=True, stream=True)
    shown = [event.get("prompt_text") for event in events_of(reply)]
    assert shown[0] == "<user>say\n<assistant>" and not any(shown[1:])
    reply, _ = await asked(path)
    assert "prompt_text" not in reply.json()


@PATHS
@pytest.mark.parametrize(("interval", "wanted"), [(None, "a b c d e f g h"), (3, "a bcd efg h"), (99, "a bcdefgh")])
async def test_chunks_have_as_many_tokens_as_the_client_wants(path: str, interval: int | None, wanted: str) -> None:
    rig = await rig_saying("abcdefgh")
    fields = {"stream": True, "stream_interval": interval, "max_tokens": 8, "return_token_ids": True}
    events = events_of((await asked(path, rig, **fields))[0])
    assert texts_of(events) == wanted.split()
    ids = [choice["token_ids"] for event in events for choice in event["choices"] if choice.get("token_ids")]
    assert ids == [list(text.encode()) for text in wanted.split()]
    last = events[-1]["choices"][0]
    assert last["finish_reason"] == "length"


@PATHS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({}, "xabab", "repetition"),
        ({"min_tokens": 6}, "xababa", "repetition"),
        ({"stop": "bab"}, "xa", "stop"),
        ({"max_tokens": 5}, "xabab", "length"),
        ({"stop_token_ids": [ord("b")]}, "xa", "stop"),
        ({"max_tokens": 4}, "xaba", "length"),
    ],
)
async def test_an_answer_that_repeats_itself_ends(
    path: str, fields: dict[str, object], text: str, reason: str, stream: bool
) -> None:
    """Where the engine ends it with the same token, or a stop string does, that is what is said, as in vLLM."""
    rig = await rig_saying("xabababababababab")
    reply, _ = await asked(path, rig, **{"max_tokens": 12, "repetition_detection": RULE, "stream": stream, **fields})
    bodies = events_of(reply) if stream else [reply.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    said = texts_of(bodies) if stream else [choices[0].get("text") or choices[0]["message"]["content"]]
    assert ("".join(said), choices[-1]["finish_reason"]) == (text, reason)
    if reason == "repetition":
        assert choices[-1]["stop_reason"] == "repetition_detected"
        assert next(iter(rig.log.newest())).state == "ok"
    if not stream:
        counted = {"stop": len(text) + (3 if "stop" in fields else 1)}.get(reason, len(text))
        assert reply.json()["usage"]["completion_tokens"] == counted


def test_a_pattern_counts_from_the_least_size_to_the_greatest() -> None:
    def ends_at(text: str, rule: Repetition, min_tokens: int = 0) -> int | None:
        watch = RepetitionWatch(rule, min_tokens)
        return next((at for at, token in enumerate(text.encode(), 1) if watch.feed(token)), None)

    assert ends_at("abcabcabc", Repetition(1, 3, 3)) == 9
    assert ends_at("abcabcabc", Repetition(1, 2, 3)) is None
    assert ends_at("aaaa", Repetition(1, 2, 4)) == 4
    assert ends_at("aaaaaaaa", Repetition(2, 2, 3)) == 6
    assert ends_at("aaaaaaaa", Repetition(1, 1, 2), min_tokens=5) == 5
    assert ends_at("abababcc", Repetition(1, 8, 2)) == 4
