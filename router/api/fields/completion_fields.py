"""The body of a completion, and its prompts."""

from typing import cast

from router.api.fields.checks import MIXED, refuse, require, token_ids
from router.api.fields.common_fields import CommonFields
from router.api.limits import ApiLimits
from router.documents.writing import document_texts
from router.requests.spec import Prompt, TextPrompt, TokenPrompt


class CompletionRequest(CommonFields, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = True
    documents: list[str | dict[str, object]] | None = None


def completion_prompts(request: CompletionRequest, limits: ApiLimits) -> list[Prompt]:
    """Raises InvalidRequestError."""
    if request.best_of is not None:
        refuse("best_of", request.best_of != (1 if request.n is None else request.n))
    prompt, special_tokens = request.prompt, request.add_special_tokens is not False
    documents = tuple(document_texts(request.documents)) if request.documents else ()
    if isinstance(prompt, str):
        return [TextPrompt(prompt, special_tokens, documents)]
    require(len(prompt) > 0, "prompt", "must not be empty")
    tokens = not all(isinstance(item, str) for item in prompt)
    require(not (documents and tokens), "documents", "come before a prompt of text, and this one is of token ids")
    if isinstance(prompt[0], int):
        return [TokenPrompt(token_ids(cast(list[int], prompt)))]
    require(len(prompt) <= limits.max_prompts, "prompt", f"has at most {limits.max_prompts} prompts")
    require(not any(isinstance(item, int) for item in prompt), "prompt", MIXED)
    return [
        TextPrompt(item, special_tokens, documents) if isinstance(item, str) else TokenPrompt(token_ids(item))
        for item in prompt
        if not isinstance(item, int)
    ]
