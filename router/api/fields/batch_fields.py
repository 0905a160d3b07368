"""The body of several chats at a time, as vLLM's server takes it, and what their prompts are made of."""

import msgspec

from kvcore.errors import InvalidRequestError
from router.api.fields.chat_fields import ChatFields, ChatRequest, chat_prompt
from router.api.fields.chat_messages import ChatMessage
from router.api.fields.checks import require
from router.api.limits import ApiLimits
from router.requests.spec import Prompt


class BatchBody(ChatFields, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions/batch: a list of messages for each chat; the other fields are all chats'."""

    messages: list[list[ChatMessage]]


class ChatBatch(ChatRequest, frozen=True, kw_only=True):
    """Chats that differ in their messages alone: `messages` are the first one's."""

    others: list[list[ChatMessage]]


def batch_of(body: BatchBody) -> ChatBatch:
    """What it asks. Raises InvalidRequestError for what is of one chat alone."""
    require(len(body.messages) > 0, "messages", "must have one chat or more")
    require(body.n in (None, 1), "n", "must be 1 where several chats are sent")
    require(body.tool_choice in (None, "none"), "tool_choice", "must be none where several chats are sent")
    for name in ("stream", "tools", "prompt_logprobs", "return_prompt_text"):
        value = getattr(body, name)
        require(value is None or value is False or value == [], name, "is not to be had where several chats are sent")
    first, *others = body.messages
    same = {name: getattr(body, name) for name in ChatFields.__struct_fields__}
    return ChatBatch(messages=first, others=others, **same)


def chats_of(request: ChatRequest) -> list[ChatRequest]:
    """Each by itself; one that is alone is what it is."""
    if not isinstance(request, ChatBatch):
        return [request]
    return [msgspec.structs.replace(request, messages=messages) for messages in (request.messages, *request.others)]


def chat_prompts(request: ChatRequest, limits: ApiLimits) -> list[Prompt]:
    """One a chat. Raises InvalidRequestError for all that is not text, by the place of the chat, too."""
    if not isinstance(request, ChatBatch):
        return [chat_prompt(request, limits)]
    chats = chats_of(request)
    require(len(chats) <= limits.max_prompts, "messages", f"has at most {limits.max_prompts} chats")
    count = sum(len(chat.messages) for chat in chats)
    require(count <= limits.max_messages, "messages", f"has at most {limits.max_messages} messages in all")
    return [_placed(number, chat, limits) for number, chat in enumerate(chats)]


def _placed(number: int, chat: ChatRequest, limits: ApiLimits) -> Prompt:
    try:
        return chat_prompt(chat, limits)
    except InvalidRequestError as error:
        if not (error.param or "").startswith("messages"):
            raise
        rest, text = (said.removeprefix("messages") for said in (error.param or "", error.message))
        place = f"messages[{number}]"
        raise InvalidRequestError(f"{place}{text}", param=f"{place}{rest}") from error
