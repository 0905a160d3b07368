"""Other projects' routers before the mock workers, each as its documentation starts it, for benchmarks.router.

Their wheels go into an environment of its own: `pip install sglang-router vllm-router smg`. Each gets the fastest of
its policies that looks at the prompt, and writes no line a request.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.children import Child, program
from benchmarks.vllm_pd_processes import free_port

_Command = Callable[[int, int, Sequence[str], Sequence[str]], list[str]]


def _launch(program_name: str, flag: str, log_level: str) -> _Command:
    def command(port: int, metrics_port: int, prefill: Sequence[str], decode: Sequence[str]) -> list[str]:
        workers = [word for url in prefill for word in ("--prefill", url)]
        workers += [word for url in decode for word in ("--decode", url)]
        own = [program_name, *(["launch"] if flag == "--pd-disaggregation" else []), "--host", "127.0.0.1"]
        ports = ["--port", str(port), "--prometheus-port", str(metrics_port)]
        return [*own, *ports, flag, "--policy", "cache_aware", "--log-level", log_level, *workers]

    return command


PEERS: dict[str, _Command] = {
    "sglang-router": _launch("sglang-router", "--pd-disaggregation", "warn"),
    "vllm-router": _launch("vllm-router", "--vllm-pd-disaggregation", "warning"),
    "smg": _launch("smg", "--pd-disaggregation", "warn"),
}
"""By name: from its port, that of its metrics, and the workers' URLs to the words of its command."""


def missing(python: Path) -> dict[str, str]:
    """Which of them are not in this environment, and what would help."""
    return {
        name: f"{python.parent / name} is not there: {python.parent / 'pip'} install {name}"
        for name in PEERS
        if not (python.parent / name).exists()
    }


@asynccontextmanager
async def peer(
    name: str, python: Path, ports: Sequence[int], pinned: Sequence[str]
) -> AsyncIterator[tuple[Child, int]]:
    """It runs, and its port; whether it has found its workers is for the caller to wait for."""
    port, metrics_port = free_port(), free_port()
    urls = [f"http://127.0.0.1:{number}" for number in ports]
    first, *rest = PEERS[name](port, metrics_port, urls[:2], urls[2:])
    command = [*pinned, "sh", "-c", 'echo started; exec "$0" "$@"', str(python.parent / first), *rest]
    async with program(command, r"^(started)") as running:
        yield running, port
