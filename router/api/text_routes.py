"""`/tokenize` and `/detokenize`, and what a vLLM server says of itself: `/ping`, `/version`, `/load`.

Owns the bodies of the first two, which are vLLM's, and their answers.
"""

import asyncio
from functools import partial
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from kvcore.process.http_body import read_body
from kvcore.release import release
from router.answering import Answerer
from router.api import openapi
from router.api.anthropic.errors import AnthropicErrorReply
from router.api.anthropic.messages import MessagesRequest, chat_of
from router.api.body import beside_if_large, parse
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.chat_messages import ChatMessage
from router.api.fields.chat_tools import Tool
from router.api.fields.checks import require, token_ids
from router.api.fields.openai_schema import prompts_of
from router.api.limits import ApiLimits
from router.api.responses import JsonReply, error_response
from router.documents.writing import document_texts
from router.processes.view import RouterView
from router.requests.spec import Prompt, TextPrompt
from router.tenants.callers import caller_of


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize: a `prompt`, or the `messages` of a chat and how the template is to render them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """None: of a prompt they are added, of a chat they are the template's."""
    return_token_strs: bool | None = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, object] | None = None
    tools: list[Tool] | None = None
    documents: list[str | dict[str, object]] | None = None
    """As of a chat, or of a completion."""


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


_Body = TypeVar("_Body", TokenizeRequest, DetokenizeRequest, MessagesRequest)


def add_text_routes(app: FastAPI, answerer: Answerer, max_body_bytes: int, limits: ApiLimits) -> None:
    """What the router's tokenizer makes of texts and tokens, as vLLM's server answers."""

    async def asked(request: Request, kind: type[_Body]) -> tuple[_Body, int]:
        raw = await read_body(request, max_body_bytes, timeout_s=limits.body_timeout_s)
        body = parse(raw, kind)
        if body.model:
            answerer.check_model(body.model)
        return body, len(raw)

    @app.post("/tokenize", **openapi.orders("The tokens of a prompt or a chat", TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        body, size = await asked(request, TokenizeRequest)
        prompt = await beside_if_large(size, partial(_prompt_of, body, limits))
        (tokens,) = await answerer.encode([prompt], caller_of(request.scope).apart(None))
        names = [answerer.tokenizer.piece(token_id) for token_id in tokens] if body.return_token_strs else None
        return JsonReply(
            {"count": len(tokens), "max_model_len": answerer.max_context, "tokens": tokens, "token_strs": names}
        )

    counted = openapi.orders("How many tokens a prompt has", MessagesRequest, error=AnthropicErrorReply)

    @app.post("/v1/messages/count_tokens", **counted)
    async def count_tokens(request: Request) -> Response:
        body, size = await asked(request, MessagesRequest)
        chat = chat_of(body, counted_only=True)
        whose = caller_of(request.scope).apart(chat.cache_salt)
        (tokens,) = await answerer.encode(await beside_if_large(size, partial(prompts_of, chat, limits)), whose)
        return JsonReply({"input_tokens": len(tokens), "context_management": {"original_input_tokens": len(tokens)}})

    @app.post("/detokenize", **openapi.orders("The text of tokens", DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        body, _ = await asked(request, DetokenizeRequest)

        def read() -> str:
            tokens = token_ids(body.tokens, "tokens") if body.tokens else []
            return answerer.tokenizer.decode(tokens, skip_special_tokens=False)

        text = read() if len(body.tokens) <= limits.inline_tokens else await asyncio.to_thread(read)
        return JsonReply({"prompt": text})


def add_probe_routes(app: FastAPI, view: RouterView) -> None:
    """What load balancers and autoscalers ask a vLLM server."""

    async def ping() -> Response:
        problem = view.problem()
        return JsonReply({"status": "ok"}) if problem is None else error_response(problem)

    said = openapi.plain("Whether a request can be served now", unavailable=True)
    app.get("/ping", **said)(ping)
    app.post("/ping", **said)(ping)

    @app.get("/version", **openapi.plain("The version of kvferry"))
    async def version_() -> Response:
        return JsonReply({"version": release()})

    @app.get("/load", **openapi.plain("How many requests are under way"))
    async def load() -> Response:
        return JsonReply({"server_load": (await view.cluster()).requests.in_flight})


def _prompt_of(body: TokenizeRequest, limits: ApiLimits) -> Prompt:
    both = body.prompt is not None and body.messages is not None
    require(not both, "prompt", "and messages must not both be given")
    if body.prompt is not None:
        documents = tuple(document_texts(body.documents or ()))
        return TextPrompt(body.prompt, body.add_special_tokens is not False, documents)
    messages = body.messages or []
    require(body.messages is not None, "prompt", "or messages must be given")
    (prompt,) = prompts_of(
        ChatRequest(
            messages=messages,
            add_special_tokens=bool(body.add_special_tokens),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
            tools=body.tools,
            documents=body.documents,
            tool_choice="none",
        ),
        limits,
    )
    return prompt
