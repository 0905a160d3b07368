"""NodeClient over vLLM's OpenAI API: servers that run already and hand KV over by their own connectors.

Owns the calls; what is sent and what it means is in `vllm_requests` and `vllm_replies`. A leg is cancelled by dropping
its connection, upon which vLLM aborts the request.
"""

import asyncio
import logging
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from kvcore.chunk_keys import adapter_identity, split_adapter
from kvcore.config.schema import ClusterConfig, NodeConfig
from kvcore.errors import DeadlineExceededError, FormCutError, NodeUnavailableError
from kvcore.ports import base_url
from kvcore.telemetry import log_fields
from kvcore.types import NodeInfo, Role
from nodeapi.adapters import ServedAdapter
from nodeapi.http_calls import MAX_REPLY_BYTES, HttpCalls, deadline
from nodeapi.messages import (
    PROTOCOL,
    EngineInfo,
    GenerateRequest,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    TokenDelta,
)
from nodeapi.prompt_logprobs import PromptLogprobs
from nodeapi.protocol import DeltaReader
from router.nodes.limits import NodeHealthLimits
from router.nodes.vllm_model import ModelFacts
from router.nodes.vllm_replies import CompletionStream, prefill_result, prompt_scores, refusal
from router.nodes.vllm_requests import decode_body, num_sequences, prefill_body, scores_body

BOOTSTRAP_PORT = 8998
MAX_HANDED_ON_BYTES = 64 << 20
_SCORE_BYTES = 200
"""As JSON, with the token's text."""
_log = logging.getLogger("router")


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    root: str = ""
    parent: str | None = None
    """Of an adapter the model that it is for."""


class _Models(msgspec.Struct):
    data: list[_Model]


class _BootstrapEntry(msgspec.Struct):
    engine_id: str


class VllmClient:
    """NodeClient for the servers of one cluster file, known by their URLs. `api_key`: theirs, if they want one."""

    def __init__(
        self,
        config: ClusterConfig,
        facts: ModelFacts,
        *,
        max_connections: int,
        api_key: str | None = None,
        limits: NodeHealthLimits = NodeHealthLimits(),
    ) -> None:
        self._kind = config.handoff
        self._usage_s = limits.vllm_usage_s
        self._model = config.model.name
        self._facts = facts
        self._nodes = {node_url(node): (name, node) for name, node in config.nodes.items()}
        self._known: dict[str, tuple[int, list[ServedAdapter], dict[str, str]]] = {}
        """Context, adapters and `kv_peer` of each server, for as long as it answers its probes: a restart changes them.
        """
        self._adapters: dict[str, str] = {}
        """By their identities, the names of all that were ever seen."""
        self._without_params: set[str] = set()
        """Prefillers that were reported for it."""
        authorization = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._calls = HttpCalls(
            refusal,
            connect_timeout_s=config.router.connect_timeout_s,
            max_connections=max_connections,
            headers={"Content-Type": "application/json"} | authorization,
            keepalive_s=limits.vllm_keepalive_s,
        )

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """See NodeClient."""
        body = prefill_body(self._name(request.cache_salt), self._kind, request)
        where, headers = f"{url}/v1/completions", {"X-Request-Id": request.request_id}
        result = prefill_result(await self._calls.fetch("POST", where, body, timeout_s, headers), request, url)
        if self._kind.traits.decode_after_prefill and not result.handoff_params and url not in self._without_params:
            self._without_params.add(url)
            log_fields(_log, logging.WARNING, "prefiller_hands_nothing_over", url=url, why="no NixlConnector there?")
        return result

    async def generate(
        self, url: str, request: GenerateRequest, reader: DeltaReader, *, first_s: float, gap_s: float
    ) -> None:
        """See NodeClient. What was cached is said with the last delta, where the server says it. Raises FormCutError
        where a form that an answer is held to would begin anew."""
        if request.sampling.grammar is not None and request.output_token_ids:
            raise FormCutError(
                f"{url} cannot go on with an answer of a given form that another server began: it would begin the form "
                "anew. Ask again"
            )
        body = decode_body(self._name(request.cache_salt), request)
        where, headers = f"{url}/v1/completions", {"X-Request-Id": request.request_id}
        sequences = num_sequences(request.sampling)
        copies = range(request.sampling.n if sequences == 1 else 1)
        sampling = request.sampling
        stream = CompletionStream(
            n=sequences,
            logprobs=sampling.logprobs,
            url=url,
            listed=sampling.logprob_token_ids,
            told=(len(request.prompt_token_ids), len(request.output_token_ids)),
        )
        scores = await self._scores(url, request, first_s)
        with await self._calls.open("POST", where, body, first_s, headers) as answer:
            now = asyncio.get_running_loop().time
            until = now() + first_s
            while not stream.ended:
                try:
                    data = await answer.read(now() + self._usage_s if stream.holds else until)
                except DeadlineExceededError:
                    if not stream.holds:
                        raise
                    data = b""
                for delta in stream.feed(data) if data else stream.flush():
                    for piece in scores:  # with the first one: from then on a node that is silent hangs
                        if not reader.take(TokenDelta(prompt_logprobs=piece)) and not await reader.ready():
                            return
                    for copy in copies:
                        each = msgspec.structs.replace(delta, index=copy) if copy else delta
                        if not reader.take(each) and not await reader.ready():
                            answer.finished = stream.ended
                            return
                    until = now() + gap_s
                if not data:
                    stream.check_broken_off()
                    return
            answer.finished = True  # but for the body's end, which [DONE] announced: the connection is kept

    async def hand_on(self, url: str, path: str, body: bytes, *, timeout_s: float) -> bytes:
        """What the server answers to a client's own request. Raises as the other calls do, and ModelNotFoundError."""
        return await self._calls.fetch("POST", f"{url}{path}", body, timeout_s, most=MAX_HANDED_ON_BYTES)

    async def _scores(self, url: str, request: GenerateRequest, timeout_s: float) -> Iterator[PromptLogprobs]:
        """Logprobs of the prompt's tokens, if they are wanted: read as they are taken."""
        top, prompt = request.sampling.prompt_logprobs, request.prompt_token_ids
        if top is None:
            return iter(())
        body = scores_body(self._name(request.cache_salt), request)
        headers = {"X-Request-Id": f"{request.request_id}.scores"}
        most = MAX_REPLY_BYTES + _SCORE_BYTES * len(prompt) * (1 + top)
        raw = await self._calls.fetch("POST", f"{url}/v1/completions", body, timeout_s, headers, most=most)
        return prompt_scores(raw, prompt, top, url)

    async def end_handoff(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """Nothing: these engines cannot be told, and the ledger does not ask for it."""

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """Nothing: the connection was dropped, which is how vLLM is told."""

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        """See NodeClient. Raises NodeUnavailableError as well for a server of another model."""
        name, node = self._nodes[url]
        known = self._known.pop(url, None)
        async with deadline(url, timeout_s):
            await self._calls.fetch("GET", f"{url}/health", b"", timeout_s)
            max_context, adapters, peer = known or await self._ask(url, node, timeout_s)
        self._known[url] = max_context, adapters, peer
        spec = self._facts.kv_spec
        return NodeReport(
            protocol=PROTOCOL,  # what it is asked, this program translates
            node=NodeInfo(id=name, role=node.role, control_url=url, incarnation=0, fingerprint=spec.fingerprint),
            engine=EngineInfo(
                kind="vllm",
                kv_spec=spec,
                max_context=max_context,
                vocab_size=self._facts.vocab_size,
                eos_token_ids=list(self._facts.eos_token_ids),
                block_size=spec.chunk_tokens,
                num_blocks=0,
                adapters=adapters,
                kv_peer=peer,
            ),
        )

    async def aclose(self) -> None:
        """See NodeClient."""
        await self._calls.aclose()

    async def _ask(
        self, url: str, node: NodeConfig, timeout_s: float
    ) -> tuple[int, list[ServedAdapter], dict[str, str]]:
        meets = self._kind.traits.bootstrap_server and node.role is Role.PREFILLER
        max_context, adapters = await self._models(url, timeout_s)
        self._adapters |= {one.identity: one.name for one in adapters}
        return max_context, adapters, await self._mooncake_peer(url, node, timeout_s) if meets else {}

    def _name(self, salt: bytes) -> str:
        """What the server calls the model, or the adapter that a salt names."""
        adapter, _ = split_adapter(salt)
        return self._adapters[adapter] if adapter else self._model

    async def _models(self, url: str, timeout_s: float) -> tuple[int, list[ServedAdapter]]:
        raw = await self._calls.fetch("GET", f"{url}/v1/models", b"", timeout_s)
        try:
            models = msgspec.json.decode(raw, type=_Models).data
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NodeUnavailableError(f"{url}/v1/models is not what vLLM answers: {error}") from error
        model = next((model for model in models if model.id == self._model), None)
        if model is None:
            served = ", ".join(model.id for model in models) or "none"
            raise NodeUnavailableError(
                f"{url} serves {served}, not {self._model}: model.name must be its --served-model-name"
            )
        if model.max_model_len is None:
            raise NodeUnavailableError(f"{url}/v1/models gives no max_model_len: is it vLLM?")
        # of their files nothing is known but where they lie, and no KV of theirs outlives the server
        return model.max_model_len, [
            ServedAdapter(name=one.id, identity=adapter_identity(one.id, one.root.encode()), path=one.root)
            for one in models
            if one.parent is not None
        ]

    async def _mooncake_peer(self, url: str, node: NodeConfig, timeout_s: float) -> dict[str, str]:
        """From the prefiller's bootstrap server, which its workers have registered with (mooncake_utils.py)."""
        host = urlsplit(url).hostname or ""
        bootstrap = base_url(host, node.bootstrap_port or BOOTSTRAP_PORT)
        raw = await self._calls.fetch("GET", f"{bootstrap}/query", b"", timeout_s)
        try:
            entries = msgspec.json.decode(raw, type=dict[str, _BootstrapEntry])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NodeUnavailableError(f"{bootstrap}/query is not what vLLM answers: {error}") from error
        if len(entries) != 1:
            raise NodeUnavailableError(
                f"{bootstrap} knows {len(entries)} engines, not one: each data-parallel rank needs a URL of its own"
            )
        (entry,) = entries.values()
        return {"remote_bootstrap_addr": bootstrap, "remote_engine_id": entry.engine_id}


def server_key() -> str | None:
    """The servers' key, from the variable that they read themselves (`--api-key` there)."""
    return os.environ.get("VLLM_API_KEY")


def node_url(node: NodeConfig) -> str:
    """Where a server's API is, without `/v1`."""
    assert node.url is not None, "config_checks wants one with this handoff"
    return node.url.rstrip("/")
