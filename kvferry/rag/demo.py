"""`kvferry rag demo FOLDER`: questions over a folder's texts, asked of a whole cluster that reuses documents.

For each question passages are found and named as documents. What was computed and reused of them is shown, and how long
the first token took: a passage that an earlier question had is not computed again, whatever it stands beside.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from rich.console import Console

from kvcore.config.file import load_config
from kvcore.process.service import Lifecycle, run_process
from kvferry.demo.client import ChatResult, DemoClient
from kvferry.demo.run import describe, ensure_model
from kvferry.launch.display import Display
from kvferry.launch.up import launched
from kvferry.rag.passages import Passage, read_folder
from kvferry.rag.search import PassageSearch

HEADER = "Answer the question from the documents, in one or two sentences."
"""The system prompt: each passage is computed behind it."""
REUSE = "kv.blend.mode=first_k"
_MAX_TOKENS = 64


def run_rag_demo(
    folder: Path, config_file: Path, overrides: Sequence[str], questions: Sequence[str], *, passages: int
) -> int:
    """Returns the exit code. Without `questions` they are read from stdin, a line each. It ends with the last one, and
    a line `RESULT {json}` where they were given. Raises ConfigError."""
    overrides = [REUSE, *overrides]
    config = load_config(config_file, overrides)
    search = PassageSearch(read_folder(folder))
    answers: list[ChatResult] = []

    async def main(lifecycle: Lifecycle) -> None:
        with Display(Console(), show_lines=False) as display:
            await ensure_model(config, display)
            async with launched(config, config_file, overrides, None, display) as launcher:
                display.end_progress()
                lifecycle.tasks.create_task(launcher.watch())
                async with DemoClient(
                    launcher.router_url, config.model.name, config.router.request_timeout_s
                ) as client:
                    async for question in _asked(questions):
                        answers.append(await _answer(client, question, search.find(question, passages), display))

    code = run_process("kvferry", main, log_level="warning")
    if questions and code == 0:
        print("RESULT " + json.dumps({"answers": [figures(answer) for answer in answers]}), flush=True)
    return code


async def _asked(questions: Sequence[str]) -> AsyncIterator[str]:
    for question in questions:
        yield question
    while not questions and (line := await asyncio.to_thread(sys.stdin.readline)):
        if line.strip():
            yield line.strip()


async def _answer(client: DemoClient, question: str, found: Sequence[Passage], display: Display) -> ChatResult:
    display.say(f"\n{question}\n    with: {', '.join(one.title for one in found) or 'no passage has a word of it'}")
    documents = [{"title": one.title, "text": one.text} for one in found]
    answer = await client.chat(HEADER, question, max_tokens=_MAX_TOKENS, on_text=display.write, documents=documents)
    display.say("\n" + describe(answer))
    return answer


def figures(answer: ChatResult) -> dict[str, float | int]:
    """What `RESULT` says of one answer."""
    return {
        "ttft_s": round(answer.ttft_s, 4),
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "approximate_tokens": answer.approximate_tokens,
    }
