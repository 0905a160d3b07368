"""Around the scheduler half: turns vLLM's requests and scheduler outputs into its plain values. Needs no vLLM itself.

Owns the block tables of live requests, the scheduler half and its lookup.
"""

import logging
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.lookup import StoreLookup
from engines.vllm.connector.orders import PARAMS_NAME, LegParams, StepOrders
from engines.vllm.connector.scheduler_half import SchedulerHalf
from engines.vllm.connector.scheduler_requests import RequestView, ScheduledRequest
from engines.vllm.connector.settings import ConnectorSettings
from kvcore.chunk_keys import KeyChain, split_adapter
from kvcore.clock import SystemClock
from kvcore.types import KVSpec

_logger = logging.getLogger("engines.vllm")


class SchedulerSide:
    """One engine's. Every method is called from vLLM's scheduler thread."""

    def __init__(
        self, settings: ConnectorSettings, spec: KVSpec, block_size: int, limits: ConnectorLimits, *, share_loads: bool
    ) -> None:
        self._tables: dict[str, list[int]] = {}
        self._lookup = StoreLookup(settings, spec.tp_size, limits)
        self._spec = spec
        self._fingerprint = spec.fingerprint
        self.half = SchedulerHalf(
            chain_of=self._chain,
            chunk_tokens=settings.chunk_tokens,
            block_size=block_size,
            save_output=settings.save_output,
            lookup=self._lookup,
            clock=SystemClock(),
            share_loads=share_loads,
            limits=limits,
        )

    def __repr__(self) -> str:
        return f"<SchedulerSide {self.half!r}, {self._lookup!r}>"

    def arrived(self, request: Any) -> None:
        """A vllm.v1.request.Request came in."""
        params = _leg_params(request)
        salt = bytes.fromhex(params.salt) if params is not None else (request.cache_salt or "").encode()
        # An adapter's KV is kept apart by the salt, which our engine makes; others' requests say nothing of its files.
        adapted, named = request.lora_request is not None, bool(split_adapter(salt)[0])
        plain = adapted == named and (params is not None or not adapted)
        plain = plain and not request.mm_features and request.prompt_embeds is None
        self.half.arrived(
            RequestView(
                request_id=request.request_id,
                token_ids=request.all_token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                params=params,
                salt=salt,
                cacheable=plain and request.sampling_params is not None,
                wants_logits=request.skip_reading_prefix_cache,
            )
        )

    def build(self, output: Any) -> StepOrders:
        """The orders of the step that a vllm.v1.core.sched.output.SchedulerOutput describes.

        vLLM sends a request's block table once and its growth afterwards, so the whole tables are kept here:

        1. A request is scheduled for the first time: `scheduled_new_reqs` has its whole table.
        2. It goes on: `new_block_ids` are appended, or None if its last block has room.
        3. It resumes after a preemption: `new_block_ids` are its whole table.
        4. It has finished: `finished` forgets the table.
        """
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for request_id, blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed[request_id] = num_computed
            new_blocks = list(blocks[0]) if blocks is not None else []
            if request_id in cached.resumed_req_ids:
                self._tables[request_id] = new_blocks
            else:
                self._tables[request_id] += new_blocks
        scheduled = [
            ScheduledRequest(
                request_id=request_id,
                num_computed_tokens=num_computed,
                num_scheduled_tokens=output.num_scheduled_tokens[request_id],
                block_ids=self._tables[request_id],
            )
            for request_id, num_computed in computed.items()
        ]
        return self.half.build(scheduled, tuple(output.preempted_req_ids or ()))

    def finished(self, request_id: str, *, holds_blocks: bool) -> tuple[bool, dict[str, Any] | None]:
        """As KVConnectorBase_V1.request_finished."""
        self._tables.pop(request_id, None)
        delay, result = self.half.finished(request_id, holds_blocks=holds_blocks)
        return delay, {PARAMS_NAME: msgspec.to_builtins(result)}

    def reset(self) -> None:
        """Take a KV identity that nobody else has, and that never was: what was stored so far is another's from now on.

        A count would not do: two engines may have been reset as often, and hold different weights.
        """
        identity = secrets.token_hex(8)
        spec = msgspec.structs.replace(self._spec, declared=(*self._spec.declared, ("reset", identity)))
        self._fingerprint = spec.fingerprint
        self.half.reset()
        _logger.info("kv_identity_reset identity=%s %r", identity, self.half)

    def close(self) -> None:
        """End the lookup's thread."""
        self._lookup.close()

    def _chain(self, salt: bytes) -> KeyChain:
        return KeyChain.of(self._fingerprint, salt)


def _leg_params(request: Any) -> LegParams | None:
    """Our entry in the request's kv_transfer_params, if there is one. A wrong one is logged and ignored."""
    params = request.kv_transfer_params
    if not isinstance(params, Mapping) or PARAMS_NAME not in params:
        return None
    try:
        leg = msgspec.convert(params[PARAMS_NAME], LegParams)
        bytes.fromhex(leg.salt)
    except (msgspec.ValidationError, ValueError) as error:
        _logger.warning("kv_transfer_params_ignored request=%s error=%s", request.request_id, error)
        return None
    return leg
