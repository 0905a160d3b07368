"""How long one large request keeps everybody else waiting at the router: a prompt of 32k and of 128k tokens as text,
a chat of 1 MB and its next turn, 128 choices with 20 logprobs a token, a million token ids, 2.6 million.

The router is a process, so are the workers behind it (`router_mocks`), which answer at once. While a large request is
under way a thread asks the router for `/ping` again and again over a kept connection; the longest of its answers is the
stall, which has the time of one such answer in it. Each case has the median over the rounds; `idle_ms` is the longest
answer while nothing else happens, in as many of them. RESULT has both, and the longest stall by case.

Estimate: what the router does on its loop is cut at 10 ms where it can be; decoding JSON cannot (a million numbers
take 40 ms), and a thread that wants the interpreter's lock gets it after 5 ms.
Run: chrt -r 1 python -m benchmarks.stalls [--rounds 5] [--only chat]
"""

import argparse
import asyncio
import http.client
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.children import program, scratch_folder
from benchmarks.router import TOKENIZING, Way, our_models, until_served, written
from benchmarks.router_mocks import MODEL

PINGS = 300
"""With nothing else under way."""
WORDS = "of the tree and a quick brown fox that jumps over lazy dogs sleeping under old Kirschbaum 1984 it, is. was; "


@dataclass(frozen=True, slots=True)
class Case:
    """`body(number)` is another one in each round. `status`: of its answer."""

    path: str
    body: Callable[[int], bytes]
    status: int = 200


@dataclass(slots=True)
class Taken:
    """What the rounds of one case gave."""

    stall_ms: list[float] = field(default_factory=list)
    took_ms: list[float] = field(default_factory=list)


def text_of(chars: int, seed: int) -> str:
    """English of a kind, three to four characters a token, another one for each seed."""
    words, rng = WORDS.split(), random.Random(seed)
    return " ".join(rng.choices(words, k=chars // 4))[:chars]


def _json(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, **fields}).encode()


def _ask(**fields: object) -> bytes:
    return _json(**{"max_tokens": 1, **fields})


def _chat(messages: int, chars: int, seed: int) -> list[dict[str, str]]:
    texts = (text_of(chars // messages, seed * 10_000 + at) for at in range(messages))
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def _many(seed: int, **fields: object) -> bytes:
    asked = {"messages": [{"role": "user", "content": f"hello {seed}"}], "n": 128, "max_tokens": 32}
    return _ask(**{**asked, "logprobs": True, "top_logprobs": 20, **fields})


def cases() -> dict[str, Case]:
    """By name."""
    chat, completion = "/v1/chat/completions", "/v1/completions"
    turns = _chat(401, 1_000_000, 99)
    return {
        "text_32k": Case(completion, lambda n: _ask(prompt=text_of(110_000, n))),
        "text_128k": Case(completion, lambda n: _ask(prompt=text_of(440_000, n))),
        "chat_1mb": Case(chat, lambda n: _ask(messages=_chat(401, 1_000_000, n))),
        "chat_1mb_turns": Case(chat, lambda n: _ask(messages=[*turns, *_chat(2 * n + 2, 2000, 98)])),
        "chat_8000_messages": Case(chat, lambda n: _ask(messages=_chat(8001, 1_000_000, n))),
        "n128_logprobs20": Case(chat, _many),
        "n128_logprobs20_stream": Case(chat, lambda n: _many(n, stream=True)),
        "ids_128k": Case(completion, lambda n: _ask(prompt=[100 + n] * 131_000)),
        "ids_1m": Case(completion, lambda n: _ask(prompt=[100 + n] * 999_000)),
        "ids_2_6m": Case(completion, lambda n: _ask(prompt=[100 + n] * 2_600_000), 413),
        "detokenize_1m": Case("/detokenize", lambda n: _json(tokens=[100 + n] * 990_000)),
        "tokenize_1mb": Case("/tokenize", lambda n: _json(prompt=text_of(1_000_000, n))),
    }


class Pings:
    """Asks the router for `/ping` in a thread of its own. `longest_ms`: of those answered since it was set to 0."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._ended = threading.Event()
        self._failed: Exception | None = None
        self.longest_ms, self.count = 0.0, 0
        self._thread = threading.Thread(target=self._ask_on, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Raises what it failed by."""
        self._ended.set()
        self._thread.join()
        self._connection.close()
        if self._failed is not None:
            raise self._failed

    def _ask_on(self) -> None:
        try:
            while not self._ended.wait(0.0005):
                began = time.perf_counter()
                self._connection.request("GET", "/ping")
                self._connection.getresponse().read()
                self.longest_ms = max(self.longest_ms, (time.perf_counter() - began) * 1e3)
                self.count += 1
        except (OSError, http.client.HTTPException) as error:
            self._failed = error


def asked(port: int, case: Case, body: bytes) -> float:
    """Milliseconds to the end of its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    began = time.perf_counter()
    connection.request("POST", case.path, body, {"content-type": "application/json"})
    answer = connection.getresponse()
    said = answer.read()
    took_ms = (time.perf_counter() - began) * 1e3
    connection.close()
    if answer.status != case.status:
        raise RuntimeError(f"{case.path} answered {answer.status}: {said[:300]!r}")
    return took_ms


def idle_ms(port: int) -> float:
    """The longest of PINGS answers while nothing else happens."""
    pings = Pings(port)
    while pings.count < PINGS and not pings._ended.wait(0.01):
        pass
    pings.close()
    return pings.longest_ms


def stalled(port: int, chosen: Mapping[str, Case], rounds: int) -> dict[str, Taken]:
    """Each case by turns."""
    found = {name: Taken() for name in chosen}
    for number in range(rounds + 1):
        for name, case in chosen.items():
            body, pings = case.body(number), Pings(port)
            took_ms = asked(port, case, body)
            pings.close()
            if number:  # the first round warms
                found[name].took_ms.append(took_ms)
                found[name].stall_ms.append(pings.longest_ms)
    return found


def result(idle: float, found: Mapping[str, Taken]) -> dict[str, Any]:
    """What is published."""
    stalls = {name: round(statistics.median(taken.stall_ms), 1) for name, taken in found.items()}
    took = {name: round(statistics.median(taken.took_ms), 1) for name, taken in found.items()}
    return {"idle_ms": round(idle, 1), "stall_ms": stalls, "took_ms": took}


async def run(rounds: int, only: str) -> dict[str, Any]:
    """Bring the processes up, and measure. RuntimeError without the demo model."""
    model = our_models().get(TOKENIZING)
    if model is None:
        raise RuntimeError("there is no demo model: `kvferry demo` makes it")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(scratch_folder()))
        mocks = program([sys.executable, "-m", "benchmarks.router_mocks"], r"^ports (.*)")
        ports: list[int] = json.loads((await stack.enter_async_context(mocks)).said)
        config = written(folder, "stalls", model, ports)
        command = [sys.executable, "-m", "router", "--config", str(config), "--set", "router.max_body=32MiB"]
        router = await stack.enter_async_context(program(command, r"url=\"?http://[^\s\"]+:(\d+)"))
        port = int(router.said)
        await until_served(Way("kvferry", port, router))
        chosen = {name: case for name, case in cases().items() if only in name}
        idle = statistics.median([await asyncio.to_thread(idle_ms, port) for _ in range(rounds)])
        return result(idle, await asyncio.to_thread(stalled, port, chosen, rounds))


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    arguments = parser.parse_args()
    found = uvloop.run(run(arguments.rounds, arguments.only))
    print(f"{'':>24}{'stall ms':>10}{'took ms':>10}")
    for name, stall in found["stall_ms"].items():
        print(f"{name:>24}{stall:>10.1f}{found['took_ms'][name]:>10.1f}")
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
