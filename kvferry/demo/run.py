"""`kvferry demo`: a whole cluster, then two questions over one long document, asked as any client would.

Shows what the cluster is for: the second question's prompt is mostly KV that is there already.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig, TorchEngineConfig
from kvcore.process.service import Lifecycle, run_process
from kvferry.demo.client import ChatResult, DemoClient
from kvferry.demo.document import QUESTIONS, document
from kvferry.launch.display import Display
from kvferry.launch.up import curl_line, launched
from kvferry.machine import size_text
from nodeapi.messages import Moved

_MAX_TOKENS = 64


def run_demo(config_file: Path, overrides: Sequence[str], log_dir: Path | None, *, once: bool) -> int:
    """Returns the exit code. With `once` it ends by itself with a line `RESULT {json}`, else at a signal."""
    config = load_config(config_file, overrides)
    results: list[dict[str, object]] = []

    async def main(lifecycle: Lifecycle) -> None:
        loop = asyncio.get_running_loop()
        with Display(Console(), show_lines=False) as display:
            await ensure_model(config, display)
            began = loop.time()
            async with launched(config, config_file, overrides, log_dir, display) as launcher:
                display.end_progress()
                up_s = loop.time() - began
                display.say(f"the cluster is up after {up_s:.1f} s")
                lifecycle.tasks.create_task(launcher.watch())
                answers = await _ask_all(config, launcher.router_url, display)
                results.append(summarise(answers, up_s))
                if not once:
                    display.say(
                        f"\nThe cluster stays up; Ctrl-C ends it. Talk to it:\n{_curl(config, launcher.router_url)}"
                    )
                    lifecycle.ready()
                    await lifecycle.stopping.wait()

    code = run_process("kvferry", main, log_level="warning")
    if once and code == 0 and results:
        print("RESULT " + json.dumps(results[0]), flush=True)
    return code


def _curl(config: ClusterConfig, url: str) -> str:
    return curl_line(url, config.model.name)


async def ensure_model(config: ClusterConfig, display: Display) -> None:
    """Make the demo model if it is what the config asks for and it is not there."""
    from kvferry.demo.model import prepare_demo_model

    wanted = Path(config.model.path)
    is_demo_model = isinstance(config.engine, TorchEngineConfig) and wanted.name.startswith("SmolLM2-135M")
    if is_demo_model and not await asyncio.to_thread(wanted.exists):
        display.say("preparing the demo model (once)")
        display.say(f"made {await asyncio.to_thread(prepare_demo_model)}")


async def _ask_all(config: ClusterConfig, url: str, display: Display) -> list[ChatResult]:
    answers = []
    async with DemoClient(url, config.model.name, config.router.request_timeout_s) as client:
        for number, question in enumerate(QUESTIONS, 1):
            display.say(f"\n[{number}] {question}")
            system = f"Answer questions about this text.\n\n{document()}"
            answer = await client.chat(system, question, max_tokens=_MAX_TOKENS, on_text=display.write)
            display.say("\n" + describe(answer))
            answers.append(answer)
    first, second = answers[0], answers[-1]
    if second.ttft_s > 0:
        display.say(
            f"\nfirst token after {first.ttft_s:.2f} s, then after {second.ttft_s:.2f} s: "
            f"{first.ttft_s / second.ttft_s:.1f} times sooner, with {second.cached_tokens} tokens reused"
        )
    return answers


def describe(answer: ChatResult) -> str:
    """What one request took, for people: two lines or more."""
    approximate = answer.approximate_tokens
    computed = answer.prompt_tokens - answer.cached_tokens - approximate
    speed = f"{answer.completion_tokens} tokens in {answer.total_s:.1f} s"
    route = f"prefilled on {answer.prefiller}" if answer.prefiller else "no prefiller"
    lines = [
        f"    first token after {answer.ttft_s:.2f} s, {speed}; {route}, decoded on {answer.decoder}",
        f"    prompt of {answer.prompt_tokens} tokens: {computed} computed, {answer.cached_tokens} reused"
        + (f", {approximate} of documents that stood elsewhere" if approximate else ""),
    ]
    for (transport, direction), total in sorted(sum_moved(answer.moved).items()):
        rate = f" at {total.num_bytes / total.seconds / 1e9:.2f} GB/s" if total.seconds else ""
        lines.append(f"    KV {direction}: {size_text(total.num_bytes)} by {transport}{rate}")
    return "\n".join(lines)


def sum_moved(moved: Sequence[Moved]) -> dict[tuple[str, str], Moved]:
    """Totals by (transport, direction)."""
    groups: dict[tuple[str, str], list[Moved]] = defaultdict(list)
    for item in moved:
        groups[item.transport, item.direction].append(item)
    return {
        key: Moved(
            transport=key[0],
            direction=key[1],
            num_bytes=sum(item.num_bytes for item in items),
            seconds=sum(item.seconds for item in items),
        )
        for key, items in groups.items()
    }


def summarise(answers: Sequence[ChatResult], up_s: float) -> dict[str, object]:
    """The RESULT object. `transport`: the one that moved the most; null if nothing moved."""
    moved = [item for answer in answers for item in answer.moved]
    by_transport: dict[str, int] = defaultdict(int)
    for item in moved:
        by_transport[item.transport] += item.num_bytes
    first, second = answers
    return {
        "first": _figures(first),
        "second": _figures(second),
        "moved_bytes": sum(by_transport.values()),
        "transport": max(by_transport, key=by_transport.__getitem__) if by_transport else None,
        "up_s": round(up_s, 3),
    }


def _figures(answer: ChatResult) -> dict[str, float | int]:
    return {
        "ttft_s": round(answer.ttft_s, 4),
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
    }
