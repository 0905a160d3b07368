"""vLLM in the caller's own process, `vllm.LLM`, with our connector in place: for kvferry.LLM.

Owns planning (which KV it will be, before anything is started), start and end, also the end of vLLM's processes when
the program is killed. The store's processes are kvferry's.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from vllm import LLM, envs
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMError
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.engine.core_client import InprocClient

from engines.provenance import FileStamp, check_unchanged
from engines.vllm.connector.connector import KVFerryConnector
from engines.vllm.connector.settings import Provenance, to_extra_config
from engines.vllm.start import (
    HUB_FILES,
    VllmStart,
    check_parallel,
    connector_config,
    connector_settings,
    measure_provenance,
    start_failure,
    weight_stamps,
)
from kvcore.config.schema import ClusterConfig, VllmEngineConfig
from kvcore.errors import ConfigError
from kvcore.model_folder import find_folder
from nodeapi.messages import NodeReport

_NOT_KV = ("chat_template", "compilation_config", "structured_outputs_config", "profiler_config")
"""Arguments that vllm.LLM takes in more forms than EngineArgs does. No KV depends on them."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveWaits:
    """How a reset of the prefix cache waits for saves under way, in seconds. `pause_s`: between two looks at a core in
    another process."""

    longest_s: float = 10.0
    pause_s: float = 0.01


@dataclass(frozen=True, slots=True)
class LLMPlan:
    """A vllm.LLM that is not started yet."""

    folder: Path
    arguments: Mapping[str, Any]
    """Of vllm.LLM, without ours."""
    provenance: Provenance
    weights: Mapping[Path, FileStamp]
    """As they were when they were digested."""
    block_size: int
    kv_bytes_per_token: int
    """On one rank, without padding."""


def plan_llm(model: str, model_id: str, arguments: Mapping[str, Any]) -> LLMPlan:
    """Ask vLLM what the arguments mean, and measure the files of `model`, a folder or hub id.

    Reads all weights unless their digests are cached. Raises ConfigError in vLLM's words, ModelLoadError.
    """
    _check_single_store()
    folder = find_folder(model, HUB_FILES)
    stamps = weight_stamps(folder)
    relevant = {name: value for name, value in arguments.items() if name not in _NOT_KV and value is not None}
    try:
        args = EngineArgs(model=str(folder), **relevant, **_our_arguments())
        config = args.create_engine_config()
    except (TypeError, ValidationError, ValueError, VLLMError) as error:
        raise ConfigError(f"vLLM refuses the arguments: {error}") from error
    check_parallel(config.parallel_config)
    return LLMPlan(
        folder=folder,
        arguments=dict(arguments),
        provenance=measure_provenance(folder, model_id, config.model_config),
        weights=stamps,
        block_size=config.cache_config.block_size,
        kv_bytes_per_token=_kv_bytes_per_token(config),
    )


def start_llm(plan: LLMPlan, config: ClusterConfig, node: NodeReport, *, save_output: bool) -> LLM:
    """With the store of `config`, of which `node` is a node on this machine. To be ended by `stop_llm`.

    Raises ConfigError, EngineError when vLLM dies at its start.
    """
    engine = VllmEngineConfig(save_output=save_output)
    start = VllmStart(config, engine, node.node.id, node.node.incarnation, host_id=node.segments[0].host_id)
    settings = connector_settings(start, plan.provenance, None)
    try:
        with ExitStack() as stack:
            stack.callback(ensure_kv_transfer_shutdown)  # vLLM leaves a connector that lives in this process
            llm = LLM(model=str(plan.folder), **plan.arguments, **_our_arguments(to_extra_config(settings)))
            stack.callback(stop_llm, llm)
            check_unchanged(plan.weights)
            _end_saves_before_resets(llm.llm_engine)
            stack.pop_all()
            return llm
    except Exception as error:  # of any kind: its parts raise whatever they like
        raise start_failure(error) from error


def _end_saves_before_resets(engine: Any, waits: SaveWaits = SaveWaits()) -> None:
    """Let reset_prefix_cache succeed where no request is left: blocks of finished ones are free once their saves have
    ended, which vLLM learns in a step, and a program that waits for no output makes none. Bounded."""
    core = engine.engine_core
    reset = core.reset_prefix_cache

    def reset_once_saved(reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        end = time.monotonic() + waits.longest_s
        if not engine.has_unfinished_requests():
            if isinstance(core, InprocClient):
                while core.engine_core.scheduler.has_finished_requests() and time.monotonic() < end:
                    core.get_output()  # of nobody
            else:
                while not reset() and time.monotonic() < end:
                    time.sleep(waits.pause_s)
        done: bool = reset(reset_running_requests, reset_connector)
        return done

    core.reset_prefix_cache = reset_once_saved


def stop_llm(llm: LLM, timeout_s: int = 10) -> None:
    """End its workers, and with them the connector, within `timeout_s`. What fails is logged."""
    try:
        llm.llm_engine.engine_core.shutdown(timeout=timeout_s)
    except (OSError, RuntimeError, VLLMError):  # its processes died before
        _logger.exception("vllm_stop_failed")


class OfflineConnector(KVFerryConnector):
    """KVFerryConnector in a program that is not ours."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """See KVFerryConnector."""
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        super().__init__(vllm_config, role, kv_cache_config)
        if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:  # the program's own process: so is its logging
            root.handlers[:] = handlers
            root.setLevel(level)
        else:
            _die_with_parent()


def _die_with_parent() -> None:
    """Kill this process once its parent has ended. vLLM's core, and a worker of it, would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="kvferry-parent", daemon=True).start()


def _our_arguments(extra: dict[str, str] | None = None) -> dict[str, Any]:
    transfer = connector_config(extra)
    transfer.kv_connector, transfer.kv_connector_module_path = OfflineConnector.__name__, __name__
    return {"kv_transfer_config": transfer, "disable_hybrid_kv_cache_manager": True}


def _check_single_store() -> None:
    """vLLM keeps one worker-side connector a process: a second engine there would load into the first one's KV."""
    if not envs.VLLM_ENABLE_V1_MULTIPROCESSING and has_kv_transfer_group():
        raise ConfigError(
            "with VLLM_ENABLE_V1_MULTIPROCESSING=0 a process has one LLM with a store at a time: close the other one "
            "first, or set the variable to 1"
        )


def _kv_bytes_per_token(config: VllmConfig) -> int:
    model, cache = config.model_config, config.cache_config
    dtype = STR_DTYPE_TO_TORCH_DTYPE.get(cache.cache_dtype, model.dtype)
    planes = 1 if model.use_mla else 2
    heads, layers = model.get_num_kv_heads(config.parallel_config), model.get_num_layers(config.parallel_config)
    return int(planes * heads * layers * model.get_head_size() * dtype.itemsize)
