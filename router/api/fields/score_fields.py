"""The fields by which a client has text scored: `echo`, logprobs of the prompt, and of tokens that it lists.

They mean here what they mean to vLLM's server. Owns their checks.
"""

from collections.abc import Sequence

import msgspec

from nodeapi.sampling import SamplingParams
from router.api.fields.batch_fields import ChatBatch, chats_of
from router.api.fields.chat_fields import ChatRequest, begins_message
from router.api.fields.chat_messages import message_of
from router.api.fields.checks import refusal, require, token_ids
from router.api.fields.completion_fields import CompletionRequest
from router.api.limits import ApiLimits
from router.requests.spec import RequestSpec, Scoring
from router.text.message_content import join_parts

AnyRequest = ChatRequest | CompletionRequest
_NOTHING = Scoring()


def scored(request: AnyRequest, sampling: SamplingParams, limits: ApiLimits) -> SamplingParams:
    """`sampling` with what is to be scored. Raises InvalidRequestError."""
    if not _scores(request):
        return sampling
    wants, given, most = _wants_logprobs(request), request.prompt_logprobs, limits.max_logprobs
    require(given is None or 0 <= given <= most, "prompt_logprobs", f"must lie between 0 and {most}")
    require(not (given and request.stream), "prompt_logprobs", "are not available when stream is true")
    listed = request.logprob_token_ids or []
    require(not listed or wants, "logprob_token_ids", "needs logprobs")
    require(len(listed) <= limits.max_listed_tokens, "logprob_token_ids", f"has at most {limits.max_listed_tokens} ids")
    alone = is_prompt_alone(request)
    require(not (listed and alone), "logprob_token_ids", "has nothing to tell where max_tokens is 0")
    sampling = msgspec.structs.replace(
        sampling,
        prompt_logprobs=_prompt_logprobs(request, sampling.logprobs),
        logprob_token_ids=token_ids(listed, "logprob_token_ids") if listed else [],
    )
    return msgspec.structs.replace(sampling, ignore_eos=True, stop_token_ids=[]) if alone else sampling


def check_size(specs: Sequence[RequestSpec], limits: ApiLimits) -> None:
    """Raises InvalidRequestError where the prompts' logprobs are more than an answer holds."""
    if (count := sum([spec.scores for spec in specs])) > limits.max_scores:
        rule = f"and echo: {count} logprobs of prompts; an answer has at most {limits.max_scores}"
        raise refusal("prompt_logprobs", rule)


def is_prompt_alone(request: AnyRequest) -> bool:
    """Whether the prompt is all that is wanted. One token is computed behind it, and counted, as by vLLM's server."""
    return request.max_tokens == 0 and isinstance(request, CompletionRequest) and bool(request.echo)


def scoring_of(request: AnyRequest) -> Scoring:
    """What of it the answer shows."""
    if not _scores(request):
        return _NOTHING
    echoes: list[str | None] | None = None
    if request.echo and isinstance(request, CompletionRequest):
        prompt, silent = request.prompt, request.return_token_ids
        one = isinstance(prompt, str) or any(isinstance(item, int) for item in prompt)
        texts = [item if isinstance(item, str) else None for item in ([prompt] if one else prompt)]
        echoes = [""] * len(texts) if silent else texts
    elif request.echo and isinstance(request, ChatRequest):
        echoes = [_last_message(chat) for chat in chats_of(request)]
    return Scoring(
        echoes=None if echoes is None else tuple(echoes),
        echo_logprobs=request.logprobs if isinstance(request, CompletionRequest) and request.echo else None,
        prompt_logprobs=not request.stream and _prompt_logprobs(request, 0) is not None,
        prompt_alone=is_prompt_alone(request),
        listed=bool(request.logprob_token_ids),
    )


def _scores(request: AnyRequest) -> bool:
    """Whether any of these fields is there that asks for something by itself."""
    return bool(request.echo or request.logprob_token_ids) or request.prompt_logprobs is not None


def _wants_logprobs(request: AnyRequest) -> bool:
    return bool(request.logprobs) if isinstance(request, ChatRequest) else request.logprobs is not None


def _prompt_logprobs(request: AnyRequest, logprobs: int | None) -> int | None:
    """As vLLM's server reads them; but none are computed that it would not show."""
    if isinstance(request, ChatRequest):
        wanted = (request.top_logprobs or 0) if request.echo else None
        shown = not (request.stream or isinstance(request, ChatBatch))
    else:
        wanted = logprobs if request.echo and request.logprobs is not None else None
        shown = not request.stream or (bool(request.echo) and request.logprobs is not None)
    given = request.prompt_logprobs
    return (wanted if given is None else given) if shown else None


def _last_message(request: ChatRequest) -> str:
    """The text of the last message, where the answer goes on with the same role."""
    last = request.messages[-1]
    if begins_message(request) and last.role != "assistant":
        return ""
    return join_parts(message_of(len(request.messages) - 1, last)["content"])
