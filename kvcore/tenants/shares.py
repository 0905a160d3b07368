"""What each tenant may have of segments and disks, as the cluster file and the file of keys say. Follows the latter."""

import asyncio
import logging

from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.eviction.quotas import TenantShares
from kvcore.telemetry import log_fields
from kvcore.tenants.salts import salts_by
from kvcore.tenants.source import KeySource
from kvcore.trust.secrets import Secrets

_logger = logging.getLogger("kvcore.tenants")


class FollowedShares:
    """`shares` changes in place. Of a machine that has no file of keys they are the cluster file's alone."""

    def __init__(self, config: ClusterConfig, secrets: Secrets | None) -> None:
        """Blocks: reads the file."""
        self.shares = TenantShares(config.store.tenant_share)
        self._secrets, self._keys = secrets, None
        wanted = config.security.keys
        if wanted is None or secrets is None:
            return
        try:
            self._keys = KeySource(wanted)
        except ConfigError as error:
            effect = "no tenant has a cache share of its own here"
            log_fields(_logger, logging.WARNING, "no_keys_here", reason=error.message, effect=effect)
            return
        self._take(self._keys, secrets)

    async def follow(self, pause_s: float = 1.0) -> None:
        """Until cancelled."""
        while (keys := self._keys) is not None and self._secrets is not None:
            await asyncio.sleep(pause_s)
            await asyncio.to_thread(keys.refresh)
            self._take(keys, self._secrets)

    def _take(self, keys: KeySource, secrets: Secrets) -> None:
        given = {tenant: limits.cache_share for tenant, limits in keys.ring.tenants.items()}
        self.shares.own = {
            salts_by(key)(tenant).owner: share
            for key in secrets.accepted
            for tenant, share in given.items()
            if share is not None
        }
