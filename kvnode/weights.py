"""Which version of the model's weights the node's engine has, and how it gets another one while the node runs.

Owns the version. An engine takes other weights by being started anew: nothing of the old ones, its prefix cache
included, outlives its process, and its KV is named after what the new one loaded. Invariant: once another version is
asked for, no engine of this node is started with the old one.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import msgspec

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.errors import DeadlineExceededError, InvalidRequestError, OverloadedError
from kvcore.telemetry import log_fields
from kvnode.supervisor import EngineSupervisor
from nodeapi.upkeep import WeightsReply, WeightsRequest

_logger = logging.getLogger("kvnode")
Quiet = Callable[[float], AbstractAsyncContextManager[int]]
"""Entered, new legs are refused, once those under way have had so many seconds to end: how many have not."""


class EngineWeights:
    """`config`: the cluster file, with the version of now."""

    def __init__(self, config: ClusterConfig, clock: Clock) -> None:
        self.config = config
        self._clock = clock
        self._taking = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<EngineWeights version {self.version or 'unnamed'}{', taking it' if self._taking.locked() else ''}>"

    @property
    def version(self) -> str:
        """`model.version`, as of the last request."""
        return self.config.model.version

    async def take(self, request: WeightsRequest, supervisor: EngineSupervisor | None, quiet: Quiet) -> WeightsReply:
        """Start the engine anew on the weights behind `model.path`, under the request's version.

        Raises what the new engine's start raises: the node goes on trying, with the new version. Raises
        NodeUnavailableError, and changes nothing, while an engine is being started.
        """
        if supervisor is None:
            raise InvalidRequestError("this node has no engine: its role is store")
        if self._taking.locked():
            raise OverloadedError(f"this node is taking over weights already ({self.version})")
        async with self._taking:
            began = self._clock.now()
            supervisor.engine()  # before legs are made to wait
            async with quiet(min(request.wait_s, request.deadline_s)) as cut:
                supervisor.engine()
                self.config = msgspec.structs.replace(
                    self.config, model=msgspec.structs.replace(self.config.model, version=request.version)
                )
                log_fields(_logger, logging.INFO, "weights_change", version=request.version, legs_cut=cut)
                try:
                    async with asyncio.timeout(max(0.0, request.deadline_s - (self._clock.now() - began))):
                        engine = await supervisor.replace()
                except TimeoutError:
                    raise DeadlineExceededError("the engine with the new weights was not ready in time") from None
        return WeightsReply(
            fingerprint=engine.info.kv_spec.fingerprint,
            version=request.version,
            cut=cut,
            seconds=self._clock.now() - began,
        )
