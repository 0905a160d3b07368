"""Puts grammars of requests that go on with another engine's answer, or that reason first, in their place.

vLLM begins a grammar at the first token that the engine itself makes, and skips reasoning as its own parser says. The
names that are replaced are those of vLLM 0.32 and 0.33; a test holds them against the one that is installed.
"""

from typing import Any

import msgspec
from vllm.v1.structured_output import StructuredOutputManager

from engines.vllm.connector.orders import PARAMS_NAME, LegParams
from engines.vllm.placed_grammar import FreeText, PlacedGrammar

_vllms_create = StructuredOutputManager._create_grammar


def place_grammars() -> None:
    """From now on, in this process, of every request that has our parameters. Once or more."""
    StructuredOutputManager._create_grammar = _create


def _create(manager: Any, request: Any) -> Any:
    grammar = _vllms_create(manager, request)
    params = (request.kv_transfer_params or {}).get(PARAMS_NAME)
    if params is None:
        return grammar
    leg = msgspec.convert(params, LegParams)
    if not leg.emitted and not leg.after:
        return grammar
    request.structured_output_request.reasoning_ended = True  # where it begins is said by `leg`, not by vLLM's parser
    placed = PlacedGrammar(grammar, FreeText(leg.after, leg.opening))
    emitted = list(request.prompt_token_ids[len(request.prompt_token_ids) - leg.emitted :])
    if not placed.accept_tokens(request.request_id, emitted):
        raise ValueError("the tokens that were sent already do not follow the grammar")
    return placed
