"""The table of request fields against vLLM's own classes: what a new vLLM brings is decided on, not forgotten."""

import random
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from transformers import AutoTokenizer
from vllm.entrypoints.generate.base.protocol import StreamOptions as VllmStreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest as VllmCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest as VllmResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import CustomChatCompletionMessageParam
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams
from vllm.v1.core.sched.utils import check_sequence_repetition

from kvcore.errors import InvalidRequestError
from router.api.body import strict_body
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.chat_messages import ChatMessage
from router.api.fields.common_fields import StreamOptions
from router.api.fields.completion_fields import CompletionRequest
from router.api.openai_responses.request import ResponsesRequest
from router.text.bad_words import bad_word_tokens
from router.text.repetition import Repetition, RepetitionWatch
from router.text.tokenizer import FolderTokenizer


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (strict_body(ChatRequest), ChatCompletionRequest.model_fields),
        (strict_body(ChatRequest), get_type_hints(chat_create_params.CompletionCreateParamsStreaming)),
        (strict_body(CompletionRequest), VllmCompletionRequest.model_fields),
        (strict_body(CompletionRequest), get_type_hints(completion_create_params.CompletionCreateParamsStreaming)),
        (strict_body(ResponsesRequest), VllmResponsesRequest.model_fields),
        (strict_body(ResponsesRequest), get_type_hints(response_create_params.ResponseCreateParamsStreaming)),
        (StreamOptions, VllmStreamOptions.model_fields),
        (ChatMessage, get_type_hints(CustomChatCompletionMessageParam)),
    ],
)
def test_every_field_that_vllm_and_openai_have_is_known(kind: type[msgspec.Struct], theirs: dict[str, object]) -> None:
    assert len(theirs) > 1 and set(theirs) <= set(kind.__struct_fields__)


def test_answers_end_with_the_token_with_which_vllm_ends_them() -> None:
    drawn, ended = random.Random(7), 0
    for _ in range(300):
        least = drawn.randint(0, 3)
        most, count, first = least + drawn.randint(0, 4), drawn.randint(2, 4), drawn.randint(0, 12)
        theirs = RepetitionDetectionParams(max_pattern_size=most, min_pattern_size=least, min_count=count)
        if not most:
            continue
        watch = RepetitionWatch(Repetition(max(1, least), most, count), first)
        tokens: list[int] = []
        for _ in range(40):
            tokens.append(drawn.randint(0, 1))
            found = len(tokens) >= first and check_sequence_repetition(tokens, theirs)
            assert watch.feed(tokens[-1]) == found
            ended += found
            if found:
                break
    assert ended > 100


def test_bad_words_are_the_tokens_that_vllm_makes_of_them(tiny: Path) -> None:
    tokenizer, theirs = FolderTokenizer(tiny), AutoTokenizer.from_pretrained(tiny)
    words = ["the", " the", "The", "once upon", "ü", "x", "qqq", "the"]
    params = SamplingParams(bad_words=words)
    theirs.max_token_id = max(theirs.get_vocab().values())
    params.update_from_tokenizer(theirs)
    found = bad_word_tokens(words, tokenizer, 128)
    assert found == params.bad_words_token_ids and any(len(word) > 1 for word in found)
    with pytest.raises(VLLMValidationError, match="at least one token"):
        SamplingParams(bad_words=[" \n"]).update_from_tokenizer(theirs)
    with pytest.raises(InvalidRequestError, match="without tokens"):
        bad_word_tokens([" \n"], tokenizer, 128)
