"""What the simulated engine must answer, from tokens alone: no blocks, no scheduler, no store."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import xxhash

from engines.sim.arithmetic import Arithmetic
from engines.sim.runner import EOS_TOKEN
from kvcore.config.schema import SimEngineConfig
from nodeapi.documents import Documents
from nodeapi.prompt_logprobs import PromptLogprobs, PromptRow
from nodeapi.sampling import SamplingParams


def expected_tokens(
    config: SimEngineConfig,
    prompt: Sequence[int],
    sampling: SamplingParams,
    n: int | None = None,
    output: Sequence[int] = (),
    *,
    documents: Documents | None = None,
    adapter: str = "",
) -> list[list[int]]:
    """The completions' tokens, one list an index (`n`; None: `sampling.n`), `output` of a continued one included.

    The context ends a completion at `config.max_context` tokens. `documents`: those that are reused.
    `adapter`: the identity of the one that answers.
    """
    arithmetic = Arithmetic(config.weights_version, config.bytes_per_token, config.vocab_size, adapter)
    reused = _reused(arithmetic, prompt, documents) if documents is not None else {}
    return [
        _completion(arithmetic, [*prompt, *output], len(prompt), sampling, index, config.max_context, reused)
        for index in range(n or sampling.n)
    ]


def expected_prompt_rows(config: SimEngineConfig, prompt: Sequence[int], top: int) -> list[PromptRow]:
    """The logprobs of a prompt's tokens but the first, with `top` others each; each number as 32 bits hold it."""
    arithmetic = Arithmetic(config.weights_version, config.bytes_per_token, config.vocab_size)
    record, rows = b"", []
    for position, (token, following) in enumerate(pairwise(prompt)):
        record = arithmetic.record(record, token, position)
        rows.append(arithmetic.prompt_row(record, following, top))
    return list(PromptLogprobs.pack(1, top, rows).rows())


def _completion(  # noqa: PLR0917
    arithmetic: Arithmetic,
    tokens: list[int],
    num_prompt: int,
    sampling: SamplingParams,
    index: int,
    max_context: int,
    reused: Mapping[int, bytes],
) -> list[int]:
    digest, record, position = xxhash.xxh3_128(), b"", 0
    stops = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS_TOKEN])}
    while True:
        done = len(tokens) - num_prompt
        if done >= sampling.max_tokens or len(tokens) >= max_context:
            return tokens[num_prompt:]
        for at in range(position, len(tokens)):
            record = reused[at] if at in reused else arithmetic.record(record, tokens[at], at)
            digest.update(record)
        position = len(tokens)
        tokens.append(arithmetic.draw(int(digest.intdigest()), sampling, index, tokens[num_prompt:]))
        if tokens[-1] in stops and done + 1 > sampling.min_tokens:
            return tokens[num_prompt:]


def _reused(arithmetic: Arithmetic, prompt: Sequence[int], documents: Documents) -> dict[int, bytes]:
    """By position, the records of reused documents: computed behind the header alone, and turned."""
    records: dict[int, bytes] = {}
    for start, stop in documents.spans:
        record, k = b"", 0 if start == documents.header else documents.k
        for at, token in enumerate([*prompt[: documents.header], *prompt[start:stop]]):
            record = arithmetic.record(record, token, at)
            stands = at - documents.header + start
            if stands >= start + k and stands < len(prompt) - 1:
                records[stands] = arithmetic.turned(record, at, stands)
    return records
