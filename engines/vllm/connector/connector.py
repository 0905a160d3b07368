"""`KVFerryConnector`: kvferry's store under vLLM, as a KVConnectorBase_V1 of vLLM 0.32 and 0.33.

A shell: it turns vLLM's objects into plain values, the halves decide and act. vLLM makes one in its scheduler's process
and one in each worker's. Loads and saves are asynchronous; what fails to load is computed (kv_load_failure_policy).
"""

import logging
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import vllm
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from engines.vllm.connector.blocks.kv_blocks import build_blocks
from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.orders import StepOrders
from engines.vllm.connector.scheduler_side import SchedulerSide
from engines.vllm.connector.settings import ConnectorSettings, from_extra_config
from engines.vllm.connector.worker_half import WorkerHalf
from engines.vllm.grammar_hook import place_grammars
from engines.vllm.kv_factors import EngineFacts, LayerFacts, declared_factors
from engines.vllm.queue_naps import wait_without_spinning
from kvcore.errors import ConfigError
from kvcore.telemetry import configure_logging
from kvcore.types import KVSpec

_logger = logging.getLogger("engines.vllm")


@dataclass
class OrdersMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step's orders, on their way from the scheduler half to the worker halves."""

    orders: StepOrders


@dataclass
class SpecMetadata(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker half measured: its KVSpec as JSON."""

    spec: bytes


class KVFerryConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See KVConnectorBase_V1 for each method's contract. Worker-side methods never raise."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Raises ConfigError for what this connector does not serve."""
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        _check_supported(vllm_config, kv_cache_config, self._settings)
        if current_platform.is_cpu():
            wait_without_spinning()
        self._limits = ConnectorLimits()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerHalf | None = None
        self._spec: KVSpec | None = None
        if role == KVConnectorRole.SCHEDULER:
            place_grammars()
        side = "scheduler" if role == KVConnectorRole.SCHEDULER else f"worker{vllm_config.parallel_config.rank}"
        configure_logging(f"{self._settings.store.node_id}.{side}")

    @property
    def requires_kv_delivery(self) -> bool:
        """False: this is a cache. A save that preemption cut short is a miss, and the decoder computes."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """False (asked by vLLM 0.33): our transports hold the addresses of the KV memory."""
        return False

    # --- worker ------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Measure the KV and start the worker half. Raises ConfigError for tensors that it does not know."""
        parallel = self._vllm_config.parallel_config
        blocks = build_blocks(
            kv_caches,
            num_blocks=self._kv_cache_config.num_blocks,
            block_size=self._vllm_config.cache_config.block_size,
        )
        rank, size = parallel.rank % parallel.tensor_parallel_size, parallel.tensor_parallel_size
        provenance = self._settings.provenance
        declared = (*provenance.declared, *declared_factors(_facts(self._vllm_config, list(kv_caches))))
        provenance = msgspec.structs.replace(provenance, declared=tuple(sorted(declared)))
        self._settings = msgspec.structs.replace(self._settings, provenance=provenance)
        self._worker = WorkerHalf(self._settings, blocks, rank, size, limits=self._limits)
        self._spec = self._worker.spec

    def get_handshake_metadata(self) -> SpecMetadata | None:
        """To the scheduler half: which KV it is."""
        return SpecMetadata(msgspec.json.encode(self._spec)) if self._spec is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before this step's blocks are overwritten."""
        if self._worker is not None and isinstance(kv_connector_metadata, OrdersMetadata):
            self._worker.preempted(kv_connector_metadata.orders.preempted)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """All our loads are asynchronous."""
        if self._worker is not None:
            self._worker.start_loads(self._orders().loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded under a running forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Chunks are saved whole, after the pass that fills them."""

    def wait_for_save(self) -> None:
        """Does not wait: hands the chunks that are full now to the background."""
        if self._worker is not None:
            self._worker.offer_saves(self._orders().saves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Saves and loads that have ended."""
        if self._worker is None:
            return None, None
        sent, received = self._worker.finished(finished_req_ids, idle=self._orders().idle)
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that a load left without their KV."""
        return self._worker.failed_blocks() if self._worker is not None else set()

    def shutdown(self) -> None:
        """End the threads, bounded."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    def _orders(self) -> StepOrders:
        metadata = self._connector_metadata
        return metadata.orders if isinstance(metadata, OrdersMetadata) else StepOrders()

    # --- scheduler ---------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """From the workers, once, before any request. Raises ConfigError when ranks hold different kinds of KV."""
        specs = {
            rank: msgspec.json.decode(handshake.spec, type=KVSpec)
            for rank, handshake in metadata.items()
            if isinstance(handshake, SpecMetadata)
        }
        if len({msgspec.structs.replace(spec, tp_rank=0) for spec in specs.values()}) != 1:
            raise ConfigError(f"the ranks of this engine hold different kinds of KV: {specs}")
        cache = self._vllm_config.cache_config
        self._scheduler = SchedulerSide(
            self._settings, specs[0], cache.block_size, self._limits, share_loads=cache.enable_prefix_caching
        )

    def on_new_request(self, request: Any) -> None:
        """The lookup begins now, not when the request is scheduled."""
        self._side.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What the store, or a prefiller that is at it, has beyond the local prefix."""
        return self._side.half.matched(request.request_id, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks for what is to be loaded."""
        self._side.half.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> OrdersMetadata:
        """This step's orders."""
        return OrdersMetadata(self._side.build(scheduler_output))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks must stay, and what the engine's front wants to know."""
        return self._side.finished(request.request_id, holds_blocks=bool(block_ids))

    def reset_cache(self) -> bool:
        """vLLM's `reset_prefix_cache(reset_connector=True)`: nothing that was stored so far is read by this engine
        again. False, and a line in the log, before its workers have said which KV it is."""
        if self._scheduler is None:
            _logger.error("kv_identity_not_reset reason=the workers have not reported yet")
            return False
        self._scheduler.reset()
        return True

    @property
    def _side(self) -> SchedulerSide:
        assert self._scheduler is not None, "vLLM used the scheduler half before its workers had sent their specs"
        return self._scheduler


def _facts(vllm_config: Any, layer_names: list[str]) -> EngineFacts:
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
    return EngineFacts(
        config=vllm_config,
        version=vllm.__version__,
        platform=current_platform.device_name,
        fp8=str(current_platform.fp8_dtype()).removeprefix("torch."),
        layers=tuple(
            LayerFacts(getattr(layer, "kv_cache_dtype", "auto"), layer.get_attn_backend().get_name())
            for layer in layers.values()
        ),
    )


def _check_supported(vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings) -> None:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(
            f"{vllm_config.model_config.model}: its KV is of {len(groups)} kinds ({', '.join(map(str, groups))}); "
            "kvferry stores models with one kind of attention KV. Serve it without kvferry, or another model"
        )
    (spec,) = {type(group.kv_cache_spec) for group in groups}
    if not issubclass(spec, FullAttentionSpec):
        raise ConfigError(
            f"{vllm_config.model_config.model}: its KV is of the kind {spec.__name__}, which vLLM drops behind the "
            "window; kvferry stores full attention's. Serve it without kvferry, or another model"
        )
    if settings.chunk_tokens % vllm_config.cache_config.block_size:
        raise ConfigError(
            f"kv.chunk_tokens: {settings.chunk_tokens} is not a multiple of vLLM's block size, "
            f"{vllm_config.cache_config.block_size}. Correct it, or set engine.args.block-size"
        )
