"""`kvferry up`: the launcher on a terminal. `launched` and `curl_line` are the demo's too."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from rich.console import Console

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.process.service import Lifecycle, run_process
from kvcore.state_folder import state_folder
from kvferry.doctor.checks import preflight
from kvferry.launch.control import controlled
from kvferry.launch.display import Display
from kvferry.launch.launcher import Launcher


def run_up(config_file: Path, overrides: Sequence[str], log_dir: Path | None) -> int:
    """Runs until a signal. Returns the exit code: 0 stopped in order, 2 the machine is not fit.

    Raises ConfigError for the file itself.
    """
    config = load_config(config_file, overrides)

    async def main(lifecycle: Lifecycle) -> None:
        with Display(Console()) as display:
            async with launched(config, config_file, overrides, log_dir, display) as launcher:
                display.end_progress()
                display.say(f"ready: {launcher.router_url}\n{curl_line(launcher.router_url, config.model.name)}")
                lifecycle.tasks.create_task(launcher.watch())
                lifecycle.describe.append(lambda: [repr(launcher)])
                lifecycle.on_hangup(launcher.hang_up)
                lifecycle.ready(router=launcher.router_url)
                await lifecycle.stopping.wait()
                display.say("stopping, after what runs has been answered (once more: at once)")

    return run_process("kvferry", main, log_level="warning")


@asynccontextmanager
async def launched(
    config: ClusterConfig, config_file: Path, overrides: Sequence[str], log_dir: Path | None, display: Display
) -> AsyncIterator[Launcher]:
    """A cluster that is ready; stopped in order on leaving. Raises ConfigError if it cannot be."""
    preflight(config)
    folder = log_dir or state_folder(config.cluster)
    display.say(f"cluster {config.cluster}, logs in {folder}")
    async with Launcher(
        config,
        config_file,
        overrides=overrides,
        log_dir=folder,
        on_line=display.on_line,
        on_event=display.on_event,
    ) as launcher:
        await launcher.wait_ready(config.service.start_s)
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(controlled(launcher, config.cluster))
            except ConfigError as error:
                display.say(f"`kvferry rollout` cannot restart these processes: {error}")
            yield launcher


def curl_line(router_url: str, model: str) -> str:
    """A command that talks to the cluster from a shell."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Tell me about rivers."}]}
    return f"curl -N {router_url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
