"""`kvferry.LLM`: kvferry's store under a vLLM in this process.

Owns the wiring: first what the KV will be, then the store's processes, then vLLM. They end in the reverse order.
"""

import importlib.util
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvcore.config.fields import ByteSize
from kvcore.config.parse import parse_byte_size
from kvcore.config.schema import ClusterConfig, ModelConfig
from kvcore.errors import ConfigError, InvalidRequestError
from kvferry.offline.cluster import (
    PRIVATE_PORTS,
    StoreCluster,
    check_arguments,
    check_room,
    choose_chunk_tokens,
    cluster_arguments,
    joined_cluster,
    private_cluster,
    read_store,
)
from kvferry.offline.store import OfflineStore, free_ports, own_address
from router.documents.writing import DocumentWriter, document_texts
from router.requests.spec import TextPrompt

_LOOPBACK = "127.0.0.1"


class LLM:
    """vllm.LLM with a store under it: a prompt whose beginning was computed before starts where that ends.

    `store` is a size, of a store that lives and dies with this object, or the file of a running cluster: then KV of the
    cluster is reused here, and what is computed here there. It goes into a segment on this machine, of size `segment`,
    that is the cluster's while this object lives; with `segment=None` it goes into the cluster's own nodes and stays.
    `chunk_tokens` must be a multiple of vLLM's block size: by default the smallest from 128 on, or the cluster's.
    Everything else is vllm.LLM's. What was reused is in the outputs' `num_cached_tokens`.

    Use it as a context manager, or call `close`. Raises ConfigError, ModelLoadError, EngineError. Not for several
    threads at once. If the store dies, answers are computed without it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        store: str | int | Path | ClusterConfig = "1GiB",
        segment: str | int | None = "256MiB",
        chunk_tokens: int | None = None,
        save_output: bool = True,
        **vllm_arguments: Any,
    ) -> None:
        check_arguments(vllm_arguments)
        wanted, room = read_store(store), _read_segment(segment)
        joined = wanted if isinstance(wanted, ClusterConfig) else None
        check_vllm()
        import engines.vllm.offline as vllm

        name = joined.model.name if joined is not None else str(model)
        arguments = {**(cluster_arguments(joined) if joined is not None else {}), **vllm_arguments}
        plan = vllm.plan_llm(str(model), name, arguments)
        tokens = choose_chunk_tokens(chunk_tokens, plan.block_size, joined)
        if isinstance(wanted, ClusterConfig):
            cluster = _join(wanted, room)
        else:
            described = ModelConfig(path=str(plan.folder), name=name)
            ports = free_ports(_LOOPBACK, PRIVATE_PORTS)
            cluster = private_cluster(described, wanted, tokens, ports)
        check_room(cluster, plan.kv_bytes_per_token)
        with ExitStack() as stack:
            processes = OfflineStore(cluster)
            stack.callback(processes.close)
            report = processes.start()
            self._llm: Any = vllm.start_llm(plan, cluster.config, report, save_output=save_output)
            stack.callback(vllm.stop_llm, self._llm)
            self._close = weakref.finalize(self, _close, stack.pop_all(), os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def engine(self) -> Any:
        """The vllm.LLM, for all else that it can do. After its weights were changed in place, call its
        `reset_prefix_cache(reset_connector=True)`: from then on it reads nothing that was stored before, and what it
        stores is its own alone."""
        if self._llm is None:
            raise RuntimeError("this LLM was closed")
        return self._llm

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        documents: Sequence[str | Mapping[str, object]] = (),
        **arguments: Any,
    ) -> list[Any]:
        """As vllm.LLM.generate: one RequestOutput a prompt. `documents` come before each prompt, as those of a
        completion do; vLLM computes them as all other text, and reuses what is found by its prefix. Raises
        InvalidRequestError for documents without a text, or beside a prompt that is none."""
        placed = _behind(documents, prompts) if documents else prompts
        outputs: list[Any] = self.engine.generate(placed, sampling_params, **arguments)
        return outputs

    def chat(self, messages: Any, sampling_params: Any = None, **arguments: Any) -> list[Any]:
        """As vllm.LLM.chat: one RequestOutput a conversation."""
        outputs: list[Any] = self.engine.chat(messages, sampling_params, **arguments)
        return outputs

    def close(self) -> None:
        """End vLLM, then the store's processes. Idempotent; also done at the end of the program."""
        self._llm = None
        self._close()


def _behind(documents: Sequence[str | Mapping[str, object]], prompts: Any) -> str | list[str]:
    texts, several = document_texts(documents), not isinstance(prompts, str)
    placed = list[str]()
    for prompt in prompts if several else [prompts]:
        if not isinstance(prompt, str):
            raise InvalidRequestError("documents come before a prompt of text, and this one is none", param="documents")
        written = DocumentWriter(None, marks=False).written(TextPrompt(prompt, documents=texts), by_template=False)
        assert isinstance(written, TextPrompt)
        placed.append(written.text)
    return placed if several else placed[0]


def check_vllm() -> None:
    """Raises ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "kvferry.LLM runs vLLM in this process, and it is not installed here: `pip install 'kvferry[vllm]'` where "
            "there is a GPU, `make venv-vllm` in kvferry's repository for a CPU"
        )


def _read_segment(segment: str | int | None) -> ByteSize | None:
    try:
        return parse_byte_size(segment) if segment is not None else None
    except ValueError as error:
        raise ConfigError(f"segment: {segment!r}: {error}") from error


def _join(config: ClusterConfig, segment: ByteSize | None) -> StoreCluster:
    host = own_address(config.metadata_server)
    (port,) = free_ports(host, 1)
    # Process ids alone meet: every container has a process 1, and two nodes of one name would each end the other's KV.
    return joined_cluster(config, f"llm-{os.getpid()}-{secrets.token_hex(4)}", host, port, segment)


def _close(stack: ExitStack, pid: int) -> None:
    if os.getpid() == pid:  # a forked process has a copy of us, and owns nothing
        stack.close()
