"""The yardstick: a KV connector for vLLM that copies whole blocks out of shared memory, and does nothing else.

No keys, no lookup, no checks, no other process: it is what a decoder cannot be faster than. A request with
`kv_transfer_params: {"bare": "keep"}` leaves the KV of its prompt in the file (there is one slot) and says so with an
empty file `NAME.kept` beside it; one with `{"bare": "load"}` and the same prompt takes it from there, inside the step
that computes its last token. Loaded by vLLM through `kv_connector_module_path`.
"""

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

_Bytes = npt.NDArray[np.uint8]


@dataclass
class _Orders(KVConnectorMetadata):
    """Block ids of the prompts to load and to keep in this step, each with its request."""

    loads: list[list[int]] = field(default_factory=list)
    keeps: list[tuple[str, list[int]]] = field(default_factory=list)


class BareCopyConnector(KVConnectorBase_V1):
    """Both halves. `kv_connector_extra_config: {"file": PATH, "file_bytes": N}`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._file, self._file_bytes = Path(extra["file"]), int(extra["file_bytes"])
        self._orders = _Orders()
        self._layers: list[_Bytes] = []
        self._kept: set[str] = set()
        self._slot: _Bytes = np.empty(0, np.uint8)

    # Scheduler half

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """All but the last token, which the step itself has to compute."""
        if _wish(request) != "load":
            return 0, False
        return request.num_prompt_tokens - 1 - num_computed_tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Prefix caching is off: the blocks are those of the whole prompt."""
        if num_external_tokens > 0:
            self._orders.loads.append(blocks.get_block_ids()[0])

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """The blocks stay until the worker half has kept them."""
        if _wish(request) != "keep":
            return False, None
        self._orders.keeps.append((request.request_id, block_ids))
        return True, None

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What has come together since the last step."""
        orders, self._orders = self._orders, _Orders()
        return orders

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Map the slot, every page faulted in."""
        self._layers = [tensor.view(torch.uint8).reshape(tensor.shape[0], -1).numpy() for tensor in kv_caches.values()]
        self._file.write_bytes(bytes(self._file_bytes))
        with self._file.open("r+b") as file:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._slot = np.frombuffer(mmap.mmap(file.fileno(), self._file_bytes, flags=flags), np.uint8)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Before the forward pass, or in a step without one."""
        orders = self._get_connector_metadata()
        assert isinstance(orders, _Orders)
        for blocks in orders.loads:
            for layer, part in self._pairs(len(blocks)):
                layer[blocks] = part
        for request_id, blocks in orders.keeps:
            for layer, part in self._pairs(len(blocks)):
                part[:] = layer[blocks]
            self._kept.add(request_id)
            self._file.with_suffix(".kept").touch()

    def _pairs(self, num_blocks: int) -> list[tuple[_Bytes, _Bytes]]:
        """Each layer's blocks, and its part of the slot."""
        block_bytes = self._layers[0].shape[1]
        parts = self._slot[: len(self._layers) * num_blocks * block_bytes]
        return list(zip(self._layers, parts.reshape(len(self._layers), num_blocks, block_bytes), strict=True))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, None]:
        """The blocks of those may be given back."""
        kept, self._kept = self._kept, set()
        return kept or None, None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end before the forward pass begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Kept when the request has ended, all layers at once."""

    def wait_for_save(self) -> None:
        """Nothing is under way."""


def _wish(request: Any) -> str | None:
    return (request.kv_transfer_params or {}).get("bare")
