"""From the body of a request to its prompts as tokens, and to the keys of their chunks.

Bodies are those of the OpenAI endpoints, with all of their checks: what is looked up is what such a request would ask.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from kvcore.chunk_keys import prompt_keys, rank_key
from kvcore.errors import InvalidRequestError, NodeUnavailableError
from kvcore.types import ChunkKey, KVSpec
from router.answering import Answerer
from router.api.body import parse
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.openai_schema import answer_request, prompts_of
from router.api.limits import ApiLimits
from router.nodes.cluster import Cluster
from router.requests.spec import RequestSpec
from router.tenants.callers import EVERYBODY, Caller


async def prompts_in(
    raw: bytes, answerer: Answerer, limits: ApiLimits = ApiLimits(), caller: Caller = EVERYBODY
) -> list[RequestSpec]:
    """The prompts of a chat's or a completion's body, with its `cache_salt`, as `caller`'s. Raises as the OpenAI
    endpoints do."""
    body = parse(raw, _kind(raw))
    if body.model:
        answerer.check_model(body.model)
    prompts = await answerer.read(prompts_of(body, limits), caller.apart(body.cache_salt))
    request = answer_request(
        body,
        [one.token_ids for one in prompts],
        max_context=answerer.max_context,
        request_id=f"cache-{uuid.uuid4().hex}",
        client_request_id="",
        limits=limits,
        documents=[one.documents for one in prompts],
    )
    for spec in request.specs:
        if not spec.prompt_token_ids:
            raise InvalidRequestError(f"{request.names.prompt} has no tokens", param=request.names.prompt)
    return list(answerer.gated(caller.salted(answerer.adapted(request, body.model))).specs)


def _kind(raw: bytes) -> type[ChatRequest] | type[CompletionRequest]:
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is no JSON object: {error}") from error
    if not {"messages", "prompt"} & fields.keys():
        raise InvalidRequestError("the body has neither messages (of a chat) nor prompt (of a completion)")
    return ChatRequest if "messages" in fields else CompletionRequest


@dataclass(frozen=True, slots=True)
class UsedKv:
    """A kind of KV that engines of this cluster make now, and the ids of their nodes."""

    spec: KVSpec
    nodes: tuple[str, ...]

    @property
    def fingerprints(self) -> list[bytes]:
        """Of every rank, rank 0 first."""
        return [msgspec.structs.replace(self.spec, tp_rank=rank).fingerprint for rank in range(self.spec.tp_size)]

    def keys(self, spec: RequestSpec) -> list[ChunkKey]:
        """Of the prompt's full chunks, of rank 0."""
        return prompt_keys(self.fingerprints[0], spec.cache_salt, spec.prompt_token_ids, self.spec.chunk_tokens)

    def by_rank(self, keys: Sequence[ChunkKey]) -> Iterator[tuple[bytes, list[ChunkKey]]]:
        """Each rank's fingerprint with its keys: what a chunk consists of."""
        for rank, fingerprint in enumerate(self.fingerprints):
            yield fingerprint, [rank_key(key, rank) for key in keys]


def used_kv(cluster: Cluster) -> list[UsedKv]:
    """What the engines of the nodes that fit make, decoders' first. Raises NodeUnavailableError if there is none."""
    specs: dict[bytes, tuple[KVSpec, list[str]]] = {}
    for node in sorted(cluster.nodes.values(), key=lambda node: node.role):
        report = node.report
        if node.unfit is None and report is not None and report.engine is not None and node.silent_since is None:
            specs.setdefault(node.fingerprint, (report.engine.kv_spec, []))[1].append(node.id)
    if not specs:
        raise NodeUnavailableError("no node's engine is there, so it is not known which KV is in use")
    return [UsedKv(spec, tuple(nodes)) for spec, nodes in specs.values()]
