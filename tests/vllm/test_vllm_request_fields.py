"""The table of request fields against vLLM's own classes: what a new vLLM brings is decided on, not forgotten."""

from typing import get_type_hints

import msgspec
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from vllm.entrypoints.generate.base.protocol import StreamOptions as VllmStreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest as VllmCompletionRequest
from vllm.renderers.chat_utils import CustomChatCompletionMessageParam

from router.api.body import strict_body
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.chat_messages import ChatMessage
from router.api.fields.common_fields import StreamOptions
from router.api.fields.completion_fields import CompletionRequest


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (strict_body(ChatRequest), ChatCompletionRequest.model_fields),
        (strict_body(ChatRequest), get_type_hints(chat_create_params.CompletionCreateParamsStreaming)),
        (strict_body(CompletionRequest), VllmCompletionRequest.model_fields),
        (strict_body(CompletionRequest), get_type_hints(completion_create_params.CompletionCreateParamsStreaming)),
        (StreamOptions, VllmStreamOptions.model_fields),
        (ChatMessage, get_type_hints(CustomChatCompletionMessageParam)),
    ],
)
def test_every_field_that_vllm_and_openai_have_is_known(kind: type[msgspec.Struct], theirs: dict[str, object]) -> None:
    assert len(theirs) > 1 and set(theirs) <= set(kind.__struct_fields__)
