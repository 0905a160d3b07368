"""Starts vLLM as the cluster file wants it, with our connector in place. The only place that makes vLLM's configs."""

import asyncio
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from pydantic import ValidationError
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from engines.provenance import DIGEST_CACHE, FileStamp, check_unchanged, versioned, weights_digest
from engines.vllm.adapters import ReadAdapter, adapter_arguments
from engines.vllm.arguments import command_line
from engines.vllm.connector.settings import ConnectorSettings, Provenance, to_extra_config
from engines.vllm.gpu_turns import gpu_turn, gpus_of
from engines.vllm.stats import VllmStats
from kvcore.config.kv_identity import declared_kv
from kvcore.config.schema import ClusterConfig, VllmEngineConfig
from kvcore.errors import ConfigError, EngineError, KVFerryError, ModelLoadError
from kvcore.model_folder import file_digest, find_folder
from kvstore.settings import store_settings

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
HUB_FILES = (*_WEIGHT_PATTERNS[:1], "*.json", "*.jinja", "*.model", "*.txt")
_NOT_PROVENANCE = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True)
class VllmStart:
    """Which engine of which node this is."""

    config: ClusterConfig
    engine: VllmEngineConfig
    node_id: str
    incarnation: int
    host_id: str

    @property
    def max_legs(self) -> int:
        """Requests running or waiting at once."""
        return self.engine.max_requests

    @property
    def store_timeout_s(self) -> float:
        """Of one call of the store."""
        return self.config.transport.timeout_s


async def start_vllm(
    start: VllmStart, bus_path: str, stats: VllmStats, adapters: Sequence[ReadAdapter] = ()
) -> AsyncLLM:
    """A running AsyncLLM, to be shut down by the caller. Holds the event loop while vLLM starts, in its turn where it
    measures a GPU's memory.

    Raises ConfigError, ModelLoadError for what vLLM refuses, EngineError when it dies at its start.
    """
    model = start.config.model
    folder = await asyncio.to_thread(find_folder, model.path, HUB_FILES)
    words = command_line(start.engine.args, model, str(folder))
    vllm_config = engine_config([*words, *adapter_arguments(start.engine.args, adapters)])
    stamps = weight_stamps(folder)
    provenance = await asyncio.to_thread(measure_provenance, folder, model.name, vllm_config.model_config)
    digest = versioned(provenance.weights_digest, model.version)
    provenance = msgspec.structs.replace(provenance, weights_digest=digest)
    settings = connector_settings(start, provenance, bus_path)
    vllm_config.kv_transfer_config.kv_connector_extra_config.update(to_extra_config(settings))
    try:
        async with gpu_turn(measured_gpus(vllm_config)):
            with ExitStack() as stack:
                llm = AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[_logger_class(stats)])
                stack.callback(llm.shutdown)
                check_unchanged(stamps)
                stack.pop_all()
                return llm
    except Exception as error:  # of any kind: its parts raise whatever they like
        raise start_failure(error) from error


def measured_gpus(config: Any) -> list[str]:
    """Those whose free memory vLLM measures when it starts with a VllmConfig, to take a part of it."""
    told = config.cache_config.kv_cache_memory_bytes is not None
    if told or config.device_config.device_type != "cuda":
        return []
    return gpus_of(os.environ, config.parallel_config.tensor_parallel_size)


def engine_config(words: Sequence[str]) -> VllmConfig:
    """vLLM's configuration for a command line, with our connector. Raises ConfigError in vLLM's own words."""
    parser = AsyncEngineArgs.add_cli_args(_Parser(prog="engine.args", add_help=False))
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(list(words)))
    args.kv_transfer_config = connector_config()
    try:
        config = args.create_engine_config()
    except (ValidationError, ValueError, VLLMError) as error:
        raise ConfigError(f"engine.args: vLLM refuses them: {error}") from error
    check_parallel(config.parallel_config, "engine.args.")
    return config


def check_parallel(parallel: Any, prefix: str = "") -> None:
    """Raises ConfigError, by `prefix` and name, for a size in a ParallelConfig that the connector does not serve."""
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name)) != 1:
            raise ConfigError(f"{prefix}{name}: {size} is not supported, only 1: use tensor parallelism")


def start_failure(error: Exception) -> KVFerryError:
    """What vLLM's start ended with, as ours. The connector's own errors are ours already."""
    if isinstance(error, KVFerryError):
        return error
    said = str(error) or type(error).__name__
    return EngineError(f"vLLM did not start: {said}. Its own log, above, has the cause")


def connector_config(extra: dict[str, Any] | None = None) -> KVTransferConfig:
    """What puts KVFerryConnector under vLLM."""
    return KVTransferConfig(
        kv_connector="KVFerryConnector",
        kv_connector_module_path="engines.vllm.connector.connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra or {},
    )


def connector_settings(start: VllmStart, provenance: Provenance, bus_path: str | None) -> ConnectorSettings:
    """The cluster file, as far as the connector needs it."""
    config = start.config
    return ConnectorSettings(
        store=store_settings(config, node_id=start.node_id, incarnation=start.incarnation, host_id=start.host_id),
        chunk_tokens=config.kv.chunk_tokens,
        save_output=start.engine.save_output,
        provenance=msgspec.structs.replace(provenance, declared=declared_kv(config)),
        bus=bus_path,
        cpus=tuple(sorted(os.sched_getaffinity(0))),
    )


def measure_provenance(folder: Path, model_id: str, model_config: Any) -> Provenance:
    """What K and V depend on: weight files, tokenizer, and the model's configuration as vLLM understood it.

    Reads all weights unless their digests are cached. Raises ModelLoadError.
    """
    weights = _weight_files(folder)
    tokenizer = next((file for name in _TOKENIZER_FILES if (file := folder / name).is_file()), None)
    if tokenizer is None:
        raise ModelLoadError(f"the model folder has no tokenizer: {folder}. Download the model again")
    settings = {k: v for k, v in model_config.hf_config.to_dict().items() if k not in _NOT_PROVENANCE}
    text = json.dumps(settings, sort_keys=True, default=str)
    return Provenance(
        model_id=model_id,
        weights_digest=weights_digest(weights, DIGEST_CACHE),
        tokenizer_digest=file_digest(tokenizer),
        attention=f"vllm.sha256:{hashlib.sha256(text.encode()).hexdigest()}",
    )


def weight_stamps(folder: Path) -> dict[Path, FileStamp]:
    """Of the weight files, for `check_unchanged` once vLLM has read them: their digest was taken before it did.

    Raises ModelLoadError.
    """
    return {file: FileStamp.of(file) for file in _weight_files(folder)}


def _weight_files(folder: Path) -> list[Path]:
    for pattern in _WEIGHT_PATTERNS:
        if files := sorted(folder.glob(pattern)):
            return files
    raise ModelLoadError(
        f"the model folder has no weights ({', '.join(_WEIGHT_PATTERNS)}): {folder}. Download the model again"
    )


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    """vLLM's parser. It raises ConfigError where vLLM's would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"engine.args: {message}. Names and values are those of `vllm serve --help=all`")


def _logger_class(stats: VllmStats) -> type[StatLoggerBase]:
    """vLLM makes its stat loggers itself, from a class."""

    class Recorder(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            """vLLM's signature."""

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            stats.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to log."""

    return Recorder
