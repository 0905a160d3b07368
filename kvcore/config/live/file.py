"""The cluster file of a process that runs: read again when it is told to, and what of it is taken over at once.

Owns what the process goes by. A file that is bad changes nothing; of a good one all is taken over that this process can
take over while it runs, and the rest is named.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from kvcore.config.file import load_config
from kvcore.config.live.settings import Settings, all_settings, changes_between, settings_name
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.telemetry import log_fields

_log = logging.getLogger("kvcore.config")
Apply = Callable[[ClusterConfig], None]


class LiveFile:
    """`config`: as the file was at the start. Use it from the loop."""

    def __init__(self, path: Path, overrides: Sequence[str], config: ClusterConfig) -> None:
        self._path, self._overrides, self._config = path, overrides, config
        self._part: Callable[[ClusterConfig], Settings] = all_settings
        self._settings = dict(all_settings(config))
        self._name: str | None = None
        self._taken: dict[str, Apply] = {}
        self._reading = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<LiveFile {self._path}, {len(self._taken)} of {len(self._settings)} settings can change>"

    @property
    def settings(self) -> Settings:
        """What the process goes by now."""
        return self._settings

    @property
    def name(self) -> str:
        """`settings_name` of it."""
        if self._name is None:
            self._name = settings_name(self._settings)
        return self._name

    def goes_by(self, part: Callable[[ClusterConfig], Settings]) -> None:
        """Say what of a file concerns this process. Before `take`."""
        self._part, self._settings, self._name = part, dict(part(self._config)), None

    def take(self, paths: Sequence[str], apply: Apply) -> None:
        """Have `apply` called with a new file's configuration where one of these differs. It must not fail."""
        self._taken |= dict.fromkeys(paths, apply)

    async def read_again(self) -> None:
        """Take over what can be, and log what changed and what needs a restart."""
        async with self._reading:
            try:
                new = await asyncio.to_thread(load_config, self._path, self._overrides)
            except ConfigError as error:
                why = error.message.replace("\n", "; ")
                log_fields(_log, logging.ERROR, "reload_failed", file=self._path, problem=why, effect="nothing changes")
                return
            changes = changes_between(self._settings, self._part(new))
            taken = [change for change in changes if change.path in self._taken]
            for apply in dict.fromkeys(self._taken[change.path] for change in taken):
                apply(new)
            for change in taken:
                self._name = None
                self._settings.pop(change.path, None)
                if change.after is not None:
                    self._settings[change.path] = change.after
            left = [str(change) for change in changes if change.path not in self._taken]
            changed = "; ".join(map(str, taken)) or "nothing"
            log_fields(_log, logging.INFO, "reloaded", file=self._path, changed=changed)
            if left:
                log_fields(_log, logging.WARNING, "restart_needed", file=self._path, settings="; ".join(left))
