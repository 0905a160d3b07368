"""The same bodies to vLLM's own server and to kvferry over vLLM: what differs is in `differences.yaml`, with a reason.

The bodies are in `bodies/`. The model knows a few answers by heart, so that they have reasoning, calls and characters
of several tokens, and no logprob is near another. All are asked once, some at a time; then a test judges each.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from support.cluster import cluster
from support.differential import Answer, ask, differences
from support.differential_rows import Row, known_differences, read_rows
from support.learnt_model import THOUGHT, make_learnt_model
from support.vllm_server import vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

ROWS = read_rows()
KNOWN = known_differences()
CONTEXT = 1024
AT_ONCE = 8
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", str(CONTEXT), "--enforce-eager", "--kv-cache-memory-bytes", "64M"),
    *("--block-size", "128", "--max-num-seqs", "16", "--enable-prompt-tokens-details"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
)
TOOLS = next(row.body["tools"] for row in ROWS if row.name == "chat/tools/auto")
THOUGHT_OF = THOUGHT.format("A short one.")
CALL = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "content": "18"},
]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


CHATS: list[tuple[dict[str, Any], str]] = [
    ({"conversation": _user("Say hello")}, THOUGHT_OF + "Hello, it is a fine day. How are you?"),
    ({"conversation": _user("Umlauts")}, THOUGHT_OF + "Äpfel, Öl, 日本語 and 🦊🦊 too."),
    ({"conversation": _user("Say hello"), "enable_thinking": False}, "Hello without a thought."),
    (
        {"conversation": _user("How is it in Rome?"), "tools": TOOLS},
        f"{THOUGHT_OF}Let me look.\n{CALL.format('Rome')}",
    ),
    (
        {"conversation": _user("How is it in Rome and in Zurich?"), "tools": TOOLS},
        f"{THOUGHT_OF}{CALL.format('Rome')}\n{CALL.format('Zürich')}",
    ),
]
CHATS += [({"conversation": HISTORY, "tools": tools}, f"{THOUGHT_OF}It is 18.") for tools in (TOOLS, None)]
TEXTS = [
    ("The quick brown fox", " jumps over the lazy dog. The dog sleeps. The fox runs on and on<|im_end|>"),
    ("keys and values", ": Schlüssel und Wörter 🔑, 値<|im_end|>"),
]

Both = dict[str, tuple[Answer, Answer]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def answers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Both]:
    """By a row's name, vLLM's answer and ours."""
    folder = tmp_path_factory.mktemp("differential")
    model = await asyncio.to_thread(make_learnt_model, folder / "model", CHATS, TEXTS, max_context=CONTEXT)
    async with AsyncExitStack() as stack:
        theirs = asyncio.create_task(stack.enter_async_context(vllm_server(model, "m", OPTIONS)))
        ours = await stack.enter_async_context(
            cluster(
                folder,
                engine="vllm",
                model=model,
                name="m",
                prefillers=1,
                decoders=1,
                overrides=["router.min_prefill_tokens=0", "router.decoder_prefill=needed"],
            )
        )
        urls = (await theirs, ours.url)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)))
        free = asyncio.Semaphore(AT_ONCE)

        async def ask_both(row: Row) -> tuple[Answer, Answer]:
            async with free:
                one, other = [await ask(session, url, row.method, row.path, row.body) for url in urls]
                return one, other

        # In a batch where others want more logprobs, vLLM fills up with tokens of no probability: these one by one.
        alone = [row for row in ROWS if isinstance(row.body, dict) and row.body.get("logprobs")]
        others = [row for row in ROWS if row not in alone]
        both = list(zip(others, await asyncio.gather(*map(ask_both, others)), strict=True))
        both += [(row, await ask_both(row)) for row in alone]
        yield {row.name: pair for row, pair in both}


def _found(row: Row, answers: Both) -> list[str]:
    return differences(*answers[row.name], row.fields)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
async def test_an_answer_is_vllms_but_for_known_differences(row: Row, answers: Both) -> None:
    unknown = [text for text in _found(row, answers) if not any(one.covers(row.name, text) for one in KNOWN)]
    assert not unknown, (row.body, *answers[row.name])


async def test_each_known_difference_shows(answers: Both) -> None:
    """One that is gone is taken out of the list, and so out of docs/openai.md."""
    shown = [(row.name, text) for row in ROWS for text in _found(row, answers)]
    gone = [(one.what, pattern) for one in KNOWN for pattern in one.unseen(shown)]
    assert not gone


async def test_the_bodies_are_many_and_their_answers_say_something(answers: Both) -> None:
    assert len(ROWS) >= 200
    told = answers["chat/tools/auto"][0].body["choices"][0]
    assert told["finish_reason"] == "tool_calls"
    assert told["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'
    assert told["message"]["reasoning"].strip() == "A short one."
    text = answers["completions/plain/unicode"][0].body["choices"][0]["text"]
    assert text == ": Schlüssel und Wörter 🔑, 値"
    assert all(min(answer.status for answer in both) < 500 for both in answers.values())
