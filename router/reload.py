"""What of a router's settings changes while it runs, when its file is read again.

Owns the list, and tells who goes by them. A request goes by what holds when it asks.
"""

from collections.abc import Callable

import msgspec

from kvcore.config.live.settings import router_settings
from kvcore.config.schema import ClusterConfig, RouterConfig
from kvcore.process.service import Lifecycle
from router.requests.services import RequestServices

LIVE = (
    *(
        "policy",
        "min_prefill_tokens",
        "decoder_prefill",
        "attempts",
        "request_timeout_s",
        "prefill_timeout_s",
        "drain_s",
    ),
    *("first_token_s", "max_waiting", "stall_first_s", "stall_gap_s", "probe_interval_s"),
)
"""Fields of `router` that change at once."""


class LiveRouter:
    """`told`: called with the settings that hold from now on; who asks `services.config` each time needs no telling."""

    def __init__(self, services: RequestServices) -> None:
        self._services = services
        self.told: list[Callable[[RouterConfig], None]] = []

    def follow(self, lifecycle: Lifecycle) -> None:
        """Go by the file of this process, if it has one."""
        if lifecycle.file is not None:
            lifecycle.file.goes_by(router_settings)
            lifecycle.file.take([f"router.{name}" for name in LIVE], self.take)

    def take(self, config: ClusterConfig) -> None:
        """Go by these fields of the file from now on, and by all others as before."""
        values = {name: value for name, value in msgspec.structs.asdict(config.router).items() if name in LIVE}
        self._services.config = msgspec.structs.replace(self._services.config, **values)
        for tell in self.told:
            tell(self._services.config)
