"""What the nodes are asked for a request: one message a leg. Pure."""

import msgspec

from nodeapi.documents import Documents
from nodeapi.messages import GenerateRequest, Handoff, PrefillRequest
from router.requests.events import StartDecode, StartPrefill
from router.requests.spec import RequestSpec

_SEED_STEP = 0x9E3779B97F4A7C15


def prefill_request(
    spec: RequestSpec,
    action: StartPrefill,
    prefer_segment: str | None,
    deadline_s: float,
    documents: Documents | None = None,
) -> PrefillRequest:
    """The prefill leg's; its chunks had best go to `prefer_segment`, the decoder's."""
    return PrefillRequest(
        request_id=action.leg,
        prompt_token_ids=spec.prompt_token_ids,
        cache_salt=spec.cache_salt,
        prefer_segment=prefer_segment,
        deadline_s=deadline_s,
        documents=documents,
    )


def generate_request(
    spec: RequestSpec,
    action: StartDecode,
    handoff: Handoff | None,
    deadline_s: float,
    *,
    handoff_params: bytes = b"",
    documents: Documents | None = None,
) -> GenerateRequest:
    """A decode leg's: of the whole request, or of one completion that goes on alone.

    That one is index 0 of its leg. Its seed must differ from its sisters', or all of them would draw the same; greedy
    completions and n = 1 are continued exactly. Before the first token all logprobs of the prompt have been told.
    """
    sampling = spec.sampling
    if sampling.prompt_logprobs is not None and (action.index is not None or action.output_token_ids):
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
    if action.index is not None:
        seed = (sampling.seed + _SEED_STEP * action.index) % (1 << 63)
        sampling = msgspec.structs.replace(sampling, seed=seed, n=1)
    return GenerateRequest(
        request_id=action.leg,
        prompt_token_ids=spec.prompt_token_ids,
        output_token_ids=list(action.output_token_ids),
        sampling=sampling,
        cache_salt=spec.cache_salt,
        handoff=handoff,
        handoff_params=handoff_params,
        deadline_s=deadline_s,
        documents=documents,
    )
