"""What the rest of kvferry believes of vLLM without importing it, held against the vLLM that is here."""

import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import MagicMock

import pytest
from vllm.config import CacheConfig, DeviceConfig
from vllm.config.cache import CacheDType
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import compute_nixl_compatibility_hash
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GenerationError, RetryableRequestError, VLLMError, VLLMServerError, VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from engines.vllm.arguments import command_line
from engines.vllm.connector.connector import KVFerryConnector
from engines.vllm.engine import VllmEngine
from engines.vllm.kv_factors import KV_FACTORS, resolved_cache_dtype
from engines.vllm.queue_naps import wait_without_spinning
from engines.vllm.start import VllmStart, measured_gpus
from kvcore.config.checks import engine_of
from kvcore.config.file import load_config
from kvcore.config.schema import VllmEngineConfig
from kvcore.config.vllm_options import RESERVED, argument_name, check_arguments
from kvcore.errors import EngineDiedError, EngineError, InvalidRequestError, OverloadedError
from kvferry.vllm_here import installed_vllm, parse_size

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
NOT_ARGUMENTS = {  # of the server, or of the connector's section: refused because people write them
    "host",
    "port",
    "headless",
    "kv-connector",
    "kv-connector-module-path",
    "kv-connector-extra-config",
    "kv-role",
    "kv-load-failure-policy",
}


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))


@pytest.fixture(scope="module")
def names(parser) -> set[str]:
    return {argument_name(text) for action in parser._actions for text in action.option_strings if text[:2] == "--"}


@pytest.mark.parametrize(
    ("device", "kv_bytes", "gpus"), [("cuda", None, ["0", "1"]), ("cuda", 1 << 30, []), ("cpu", None, [])]
)
def test_a_gpus_memory_is_measured_where_nobody_says_what_kv_takes(monkeypatch, device, kv_bytes, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_bytes),
        device_config=SimpleNamespace(device_type=device),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
    )
    assert measured_gpus(config) == gpus
    assert CacheConfig().kv_cache_memory_bytes is None and hasattr(DeviceConfig(device="cpu"), "device_type")


def test_every_reserved_name_is_an_argument_of_vllms(names):
    unknown = {name for name in RESERVED if not any(known == name or known.startswith(name) for known in names)}
    assert unknown == NOT_ARGUMENTS


def test_no_argument_is_refused_that_kvferry_has_nothing_to_do_with(names):
    """A reserved name's beginnings are refused too, as vLLM's parser would take them for it."""
    refused = {name for name in names if list(check_arguments({name: "x"}))}
    families = tuple(name for name in RESERVED if name.endswith("-"))
    assert families == ("lora-", "data-parallel-")
    known = {name for name in RESERVED if name in names} | {name for name in names if name.startswith(families)}
    assert {name.removeprefix("no-") for name in refused} == known


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_vllm_understands_the_arguments_of_the_shipped_configurations(file, parser):
    config = load_config(file)
    for node in config.nodes.values():
        engine = engine_of(config, node)
        if isinstance(engine, VllmEngineConfig):
            args = AsyncEngineArgs.from_cli_args(parser.parse_args(command_line(engine.args, config.model, "/m")))
            assert args.max_model_len == config.model.max_context
            size = engine.args.get("kv-cache-memory-bytes")
            assert args.kv_cache_memory_bytes == (None if size is None else parse_size(size))


def test_an_engine_shows_its_node_and_its_legs():
    config = load_config(Path(__file__).parents[2] / "configs" / "vllm-cpu.yaml")
    start = VllmStart(config, VllmEngineConfig(max_requests=8), "decode-0", 1, "host")
    assert repr(VllmEngine(start)) == "<VllmEngine of decode-0, not started, 0 of 8 legs>"


def test_the_build_is_told_without_importing_it():
    build = installed_vllm()
    assert build is not None and build.supported and build.platform == "cpu"


def test_vllms_queue_sleeps_where_it_would_spin_and_else_waits_as_before(monkeypatch):
    """vLLM uses the names that we replace, and a reader is woken in either state."""
    monkeypatch.setattr(shm_broadcast, "sched_yield", pytest.fail)
    monkeypatch.setattr(shm_broadcast.SpinCondition, "wait", shm_broadcast.SpinCondition.wait)
    wait_without_spinning()
    monkeypatch.setattr(shm_broadcast, "sched_yield", pytest.fail)
    queue = shm_broadcast.MessageQueue(1, 1)
    reader = shm_broadcast.MessageQueue.create_from_handle(queue.export_handle(), 0)
    condition = reader._spin_condition
    for idle_s in (0.0, condition.busy_loop_s + 1):
        condition.last_read = time.monotonic() - idle_s
        sender = threading.Timer(0.01, queue.enqueue, args=(idle_s,))
        sender.start()
        assert reader.dequeue(timeout=30) == idle_s
        sender.join()

    naps: list[float] = []
    now = time.monotonic()
    monkeypatch.setattr("engines.vllm.queue_naps.time.sleep", naps.append)
    monkeypatch.setattr("engines.vllm.queue_naps.time.monotonic", lambda: now)
    for idle_s in (0.0, 0.008, 0.5):
        condition.last_read = now - idle_s
        condition.wait(timeout_ms=1)
    assert naps == [pytest.approx(20e-6), pytest.approx(250e-6), pytest.approx(500e-6)]


def test_each_factor_of_nixls_compatibility_hash_is_declared_or_known_to_be_none_of_ours(monkeypatch):
    hashed: dict[str, object] = {}
    monkeypatch.setattr("vllm.config.utils.hash_factors", lambda factors: hashed.update(factors) or "")
    compute_nixl_compatibility_hash(MagicMock(), "FLASH_ATTN")
    ours = {
        "vllm_version": "vllm",
        "dtype": "dtype",
        "attn_backend_name": "attention-backend",
        "cache_dtype": "kv-cache-dtype",
        "speculative_config": "speculative-config",
    }
    fields = {"model", "num_kv_heads", "head_size", "num_hidden_layers"}  # KVSpec's weights and shape
    fixed = {"nixl_connector_version", "is_hma_enabled", "transfer_mode"}  # kvferry has one kind of each
    assert hashed.keys() == ours.keys() | fields | fixed
    assert set(ours.values()) <= KV_FACTORS.keys()


def test_every_kind_of_kv_that_vllm_knows_is_told_from_every_other():
    kinds = [resolved_cache_dtype(name, "bfloat16", "float8_e4m3fn") for name in get_args(CacheDType)]
    same = {"auto": "bfloat16", "fp8": "fp8_e4m3"}
    assert len(set(kinds)) == len(kinds) - len(same)
    assert {name for name, kind in zip(get_args(CacheDType), kinds, strict=True) if kind != name} == same.keys()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (EngineDeadError(), EngineDiedError),
        (VLLMValidationError("top_k"), InvalidRequestError),
        (VLLMValidationError("too many", parameter="logit_bias"), InvalidRequestError),
        (EngineGenerateError(), EngineError),
        (GenerationError(), EngineError),
        (RetryableRequestError(), OverloadedError),
        (VLLMServerError("a later kind"), EngineError),
        (VLLMError("a later kind"), EngineError),
        (ValueError("out of range"), EngineError),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_every_error_of_vllms_becomes_one_of_ours(theirs, ours):
    async def generate(*arguments: object, **named: object) -> AsyncGenerator[object, None]:
        raise theirs
        yield

    engine = VllmEngine(MagicMock())
    engine._llm = SimpleNamespace(generate=generate)
    with pytest.raises(ours) as caught:
        async for _ in engine._outputs("leg", [1], b"", MagicMock(), 5.0):
            pass
    assert type(caught.value) is ours
    assert caught.value.param == getattr(theirs, "parameter", None)


def test_a_connector_whose_workers_have_not_reported_says_that_it_was_not_reset(caplog):
    connector = object.__new__(KVFerryConnector)
    connector._scheduler = None
    assert connector.reset_cache() is False
    assert "kv_identity_not_reset" in caplog.text
    connector._scheduler = MagicMock()
    assert connector.reset_cache() is True
    connector._scheduler.reset.assert_called_once_with()
