"""A prefiller and a decoder, three ways, and one vLLM that does both: the same vLLM 0.32 on a CPU, model and prompts.

plain        one vLLM on one core
bare         its KV comes by a bare copy of blocks in one process (vllm_pd_bare): the decoder's time at its least
nixl         two vLLM with NixlConnector behind a proxy of two legs in sequence, as vLLM's toy_proxy (vllm_pd_proxy);
             its threads are put where the others' are, without which it is far slower (vllm_pd_threads)
lmcache      two vLLM with LMCacheMPConnector, `lmcache server` as its documentation starts it, the same proxy
lmcache_shm  the same with the server's memory shared with the nodes, which is an option of it
kvferry      `kvferry up`: router, metadata server, a prefiller and a decoder

Two cores cannot hold all of them at once: each system comes up in its turn and runs all its rounds, and the plain vLLM,
which stays up from beginning to end, is asked each prompt just before the system is. So the machine's drift shows in
the plain figures beside each system (`plain_drift`: the largest of their medians over the smallest), and ratios are
taken there. Prefiller and plain vLLM compute on the first core, the decoder on the second; routers, proxies, servers
and this client go where the kernel puts them. Prompts are fresh random token ids. Every answer is held against the
plain one's. The first prompts of a system, one each of the shortest and the longest length, are not counted.

`ttft`, `total`: as the client sees them, through the router or proxy; `token`: each token after the first.
`decoder`: until the decoder's first token came, with all KV stored before it was asked: at the proxy for nixl and
lmcache, at the node's own API for kvferry and bare.
`reuse`: one node has computed a prefix (the tokens rounded to a multiple of 256) and 32 tokens more; a second later
another prompt with that prefix and 32 other tokens is asked of the other node: LMCache's directly, kvferry's through
its router.

Estimate, 8,000 tokens of 20 KiB: 164 MB, 20 ms at 8 GB/s and 30 ms for the decoder's step over 8,000 tokens of KV.
Run, with what scripts/make_peer_venvs.sh made in FOLDER, in the environment of `make venv-vllm`:
python -m benchmarks.vllm_pd --nixl-python FOLDER/nixl/bin/python --lmcache-python FOLDER/lmcache/bin/python
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path

import aiohttp

from benchmarks.vllm_pd_client import NEW_TOKENS
from benchmarks.vllm_pd_kvferry import kvferry
from benchmarks.vllm_pd_processes import MAX_CONTEXT, REPOSITORY, Setting
from benchmarks.vllm_pd_report import Round, SystemResult, print_system, row
from benchmarks.vllm_pd_systems import FIRST_CORE, Server, System, bare_copy, lmcache, nixl, vllm
from kvcore.errors import KVFerryError
from kvcore.process.http_client import http_session

LENGTHS = (500, 2000, 4000, 8000)
SYSTEMS = ("bare", "nixl", "lmcache", "lmcache_shm", "kvferry")
PREFIX_STEP = 256
SUFFIX = 32
LONGEST_PREFIX = (MAX_CONTEXT - SUFFIX - NEW_TOKENS) // PREFIX_STEP * PREFIX_STEP
FIRST_TOKEN_ID = 3
"""Below it are the special tokens of most models."""
SPIN_S = 1.5
"""vLLM's processes spin for a second after each message. Plain and prefiller share a core: each is to have it whole."""
_FAILURES = (RuntimeError, TimeoutError, OSError, aiohttp.ClientError, KVFerryError)


class Prompts:
    """Random token ids: no two prompts have a prefix in common that was not asked for."""

    def __init__(self, model: Path) -> None:
        self._config = json.loads((model / "config.json").read_text())
        self._random = random.Random(0)

    def fresh(self, length: int) -> list[int]:
        """The next prompt."""
        return self._random.choices(range(FIRST_TOKEN_ID, self._config["vocab_size"]), k=length)

    def context_bytes(self) -> int:
        """KV of MAX_CONTEXT tokens in float32."""
        config = self._config
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return int(2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * MAX_CONTEXT)


async def one_round(system: System, plain: Server, prompts: Prompts, tokens: int) -> Round:
    """All that is measured of one system at one length, once."""
    prompt = prompts.fresh(tokens)
    await asyncio.sleep(SPIN_S)
    beside = await plain.ask(prompt)
    await asyncio.sleep(SPIN_S)
    whole = await system.ask(prompt)
    decoder_ttft_s = whole.decoder_ttft_s or await system.decode(prompts.fresh(tokens))
    prefix = prompts.fresh(min(max(round(tokens / PREFIX_STEP), 1) * PREFIX_STEP, LONGEST_PREFIX))
    reuse = await system.reuse(prefix + prompts.fresh(SUFFIX), prefix + prompts.fresh(SUFFIX))
    return Round(beside, whole, decoder_ttft_s, reuse)


async def measure(
    result: SystemResult, system: System, plain: Server, prompts: Prompts, *, lengths: list[int], rounds: int
) -> None:
    """Fill `result`, round by round, so that what was measured is kept when a later round fails."""
    for tokens in sorted({min(lengths), max(lengths)}):
        await one_round(system, plain, prompts, tokens)
    for _ in range(rounds):
        for tokens in lengths:
            one = await one_round(system, plain, prompts, tokens)
            result.rounds.setdefault(tokens, []).append(one)


def contexts(
    setting: Setting, arguments: argparse.Namespace
) -> dict[str, Callable[[], AbstractAsyncContextManager[System]]]:
    """How each system is brought up. Raises RuntimeError where its interpreter was not given."""

    def needed(python: Path | None, option: str) -> Path:
        if python is None:
            raise RuntimeError(f"{option} was not given (scripts/make_peer_venvs.sh makes its environment)")
        return python

    def peer(python: Path | None, mode: str) -> AbstractAsyncContextManager[System]:
        return lmcache(setting, needed(python, "--lmcache-python"), mode)

    return {
        "bare": lambda: bare_copy(setting, arguments.python),
        "nixl": lambda: nixl(setting, needed(arguments.nixl_python, "--nixl-python")),
        "lmcache": lambda: peer(arguments.lmcache_python, "default"),
        "lmcache_shm": lambda: peer(arguments.lmcache_python, "shm"),
        "kvferry": lambda: kvferry(setting, arguments.python),
    }


@asynccontextmanager
async def prepared(arguments: argparse.Namespace) -> AsyncIterator[tuple[Setting, Prompts]]:
    """Folders, the model, a client."""
    kept = arguments.folder
    with (
        nullcontext(str(kept)) if kept else tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as shared,
    ):
        folder = Path(name)
        model = await asyncio.to_thread(find_model, arguments, folder)
        prompts = Prompts(model)
        connector = aiohttp.TCPConnector(force_close=False, keepalive_timeout=600)
        async with http_session(connector=connector) as session:
            yield Setting(model, folder, Path(shared), prompts.context_bytes(), session), prompts


def find_model(arguments: argparse.Namespace, folder: Path) -> Path:
    """The one that was given, or a new one in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.model is not None:
        return Path(arguments.model)
    command = [str(arguments.python), "-m", "benchmarks.vllm_pd_model", str(folder / "model")]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    return folder / "model"


async def run(arguments: argparse.Namespace) -> None:
    """Every system in turn, beside the plain vLLM; prints the tables and RESULT."""
    this, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert this is not None

    def stop() -> None:
        loop.add_signal_handler(signal.SIGTERM, lambda: None)  # `timeout` sends two: the second would cut the clean-up
        this.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    results: list[SystemResult] = []
    async with (
        prepared(arguments) as (setting, prompts),
        vllm(setting, arguments.python, "plain", FIRST_CORE) as plain,
    ):
        started = contexts(setting, arguments)
        for name in arguments.systems:
            result = SystemResult(name)
            try:
                async with started[name]() as system:
                    await measure(result, system, plain, prompts, lengths=arguments.tokens, rounds=arguments.rounds)
            except _FAILURES as error:
                result.problem = f"{type(error).__name__}: {error}"
            results.append(result)
            print_system(result)
    rows = [row(results, tokens) for tokens in arguments.tokens]
    print("RESULT " + json.dumps({"rows": rows, "rounds": arguments.rounds, "not_measured": reasons(results)}))


def reasons(results: list[SystemResult]) -> dict[str, str]:
    """Why there are nulls."""
    return {result.name: result.problem.splitlines()[0] for result in results if result.problem}


def main() -> None:
    """Print the tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=lambda text: [int(word) for word in text.split(",")], default=list(LENGTHS))
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS))
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="has vLLM and kvferry")
    parser.add_argument("--nixl-python", type=Path, help="has vLLM and NIXL")
    parser.add_argument("--lmcache-python", type=Path, help="has vLLM and LMCache")
    parser.add_argument("--model", type=Path, help="a folder; default: one is made")
    parser.add_argument("--folder", type=Path, help="where logs, configurations and the model stay; default: nowhere")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
