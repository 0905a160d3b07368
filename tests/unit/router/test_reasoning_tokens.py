"""How many tokens of an answer are reasoning: those between the marks, however they come, and whoever computes them."""

import json
from typing import Any

import httpx
import pytest
from support.router_fakes import asking, make_rig, two_and_two

from nodeapi.messages import FinishReason, TokenDelta
from router.parsing.dialects import DIALECTS, AnswerParser
from router.parsing.reasoning_tokens import ReasoningTokens

ANSWER = "<think>\nEs ist Zürich.\n</think>\n\nIt rains."
THOUGHT = len("\nEs ist Zürich.\n".encode())
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "How is it?"}], "max_tokens": 500}


def counted(name: str, tokens: list[str], prompt_end: str = "") -> int:
    reasoning = ReasoningTokens(AnswerParser(DIALECTS[name], None, prompt_end))
    for token in tokens:
        if not reasoning.over:
            reasoning.feed(token)
    reasoning.end()
    return reasoning.count


@pytest.mark.parametrize(
    ("name", "tokens", "wanted"),
    [
        ("think", ["<think>", "\n", "What", " now", "\n", "</think>", "\n\n", "Well", "."], 4),
        ("think", ["<th", "ink", ">", "What", " now", "</", "think", ">", "Well"], 2),
        ("think", ["Well", " <think>", "x", "</think>"], 0),
        ("think", ["<think>", "</think>", "Well"], 0),
        ("think", ["<think>", "a", " </", "b>", "\n\n", "c"], 5),
        ("hermes", ["\n", "<think>", "a", "", "", "é", "</think>", "", "é"], 4),
        ("kimi_k2", ["<think>", " a", "</think>", "b"], 1),
        ("mistral", ["[THINK]", "a", "b", "[/THINK]", "c"], 2),
        ("gemma4", ["<|channel>", "thought", "\n", "a", "b", "<channel|>", "c"], 2),
        (
            "gpt_oss",
            [
                *("<|channel|>", "analysis", "<|message|>", "a", "b", "<|end|>", "<|start|>", "assistant"),
                *("<|channel|>", "commentary", "<|message|>", "c", "<|end|>", "<|start|>", "assistant"),
                *("<|channel|>", "analysis", "<|message|>", "d", "<|end|>", "<|start|>", "assistant"),
                *("<|channel|>", "final", "<|message|>", "e"),
            ],
            3,
        ),
        ("kimi_k3", ["a", "b", "<|close|>", "think", "<|sep|>", "<|open|>", "response", "<|sep|>", "c"], 2),
    ],
)
def test_tokens_between_the_marks_count(name: str, tokens: list[str], wanted: int) -> None:
    assert counted(name, tokens) == wanted


def test_reasoning_that_the_prompt_has_opened_counts_from_the_first_token() -> None:
    assert counted("think", ["a", "b", "</think>", "c"], "<|im_start|>assistant\n<think>\n") == 2


def test_a_thought_that_is_cut_off_counts_to_its_last_token() -> None:
    assert counted("think", ["<think>", "a", " </th", ""]) == 3


def test_a_call_ends_a_thought_that_the_model_forgot_to_end() -> None:
    reasoning = ReasoningTokens(AnswerParser(DIALECTS["qwen3_xml"], {"add": {}}, ""))
    for token in ["<think>", "a", "<tool_call>", "\n", "<function=", "add", ">", "\n"]:
        reasoning.feed(token)
    reasoning.end()
    assert reasoning.count == 1 and reasoning.over


async def usages(http: Any, **fields: object) -> list[Any]:
    """Of a chat in one body, of one in a stream, and of a response in either."""
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    whole = await http.post("/v1/chat/completions", json={**CHAT, **fields})
    chat = await http.post("/v1/chat/completions", json={**CHAT, **fields, **stream})
    asked = {"input": "How is it?", "max_output_tokens": 500}
    response = await http.post("/v1/responses", json=asked)
    events = await http.post("/v1/responses", json={**asked, "stream": True})
    last = json.loads(events.text.strip().split("data: ")[-1])["response"]
    usage = json.loads(chat.text.strip().split("data: ")[-2])["usage"]
    return [whole.json()["usage"], usage, response.json()["usage"], last["usage"]]


def thoughts(found: list[Any]) -> list[int]:
    return [(one.get("completion_tokens_details") or one["output_tokens_details"])["reasoning_tokens"] for one in found]


async def test_usage_says_how_many_streamed_or_not() -> None:
    async with asking(ANSWER, "hermes") as (http, _):
        assert thoughts(await usages(http)) == [THOUGHT] * 4
        assert thoughts(await usages(http, include_reasoning=False)) == [THOUGHT] * 4, "hidden, and computed"
        many = (await http.post("/v1/chat/completions", json={**CHAT, "n": 3, "temperature": 1})).json()["usage"]
        assert many["completion_tokens_details"] == {"reasoning_tokens": 3 * THOUGHT}


async def test_it_is_the_same_when_another_decoder_goes_on_in_the_thought() -> None:
    async with asking(ANSWER, "hermes") as (http, rig):
        for node in rig.nodes.nodes:
            node.die_after = len("<think>\nEs")
        assert thoughts(await usages(http)) == [THOUGHT] * 4


@pytest.mark.parametrize("size", [2, 7, 1000])
async def test_it_is_the_same_however_many_tokens_come_at_once(size: int) -> None:
    tokens = list(ANSWER.encode())
    parts = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    nodes = two_and_two()
    for node in nodes.nodes:
        node.script = [TokenDelta(token_ids=part) for part in parts[:-1]]
        node.script.append(TokenDelta(token_ids=parts[-1], finish_reason=FinishReason.LENGTH))
    rig = await make_rig(nodes, parser="hermes")
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        assert thoughts(await usages(http)) == [THOUGHT] * 4
        assert thoughts(await usages(http, stop=["rains"])) == [THOUGHT] * 4


async def test_usage_so_far_counts_the_thought_so_far() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with asking(ANSWER, "hermes") as (http, _):
        reply = await http.post("/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": options})
    rows = [json.loads(line[6:])["usage"] for line in reply.text.split("\n\n") if line and "[DONE]" not in line]
    counts = [row["completion_tokens_details"]["reasoning_tokens"] for row in rows]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == THOUGHT and len(set(counts)) > 5


async def test_a_model_that_does_not_reason_has_no_such_count() -> None:
    for parser in ("llama3_json", "none"):
        async with asking("It rains.", parser) as (http, _):
            usage = (await http.post("/v1/chat/completions", json=CHAT)).json()["usage"]
            assert "completion_tokens_details" not in usage
