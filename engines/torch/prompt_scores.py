"""Logprobs of a prompt's own tokens, from hidden states.

Invariant: no more than ROWS rows of logits are there at a time, whatever the length of the prompt.
"""

from collections.abc import Callable

import torch

from engines.paged.runner import ScoreSpec
from nodeapi.prompt_logprobs import PromptLogprobs

ROWS = 64
"""Of a vocabulary of 150,000 tokens so many are 38 MB."""


def score_prompt(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], spec: ScoreSpec, start: int
) -> PromptLogprobs | None:
    """What `spec` asks for, of `hidden` ([number of targets, hidden size]). `head` makes logits of hidden states.
    `start`: where the first target stands. None: a logit is not a number, the KV or the weights are broken."""
    ids, values, ranks = [], [], []
    targets = torch.tensor(spec.targets, dtype=torch.int64)[:, None]
    for rows, own in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        logprobs = torch.log_softmax(head(rows).float(), dim=-1)
        if torch.isnan(logprobs).any():
            return None
        told = logprobs.gather(1, own)
        best, best_ids = logprobs.topk(min(spec.top, logprobs.shape[1]), dim=-1)
        ids.append(torch.cat((own, best_ids), dim=1))
        values.append(torch.cat((told, best), dim=1))
        ranks.append((logprobs >= told).sum(dim=-1))
    all_ids = torch.cat(ids)
    return PromptLogprobs(
        start=start,
        top=all_ids.shape[1] - 1,
        token_ids=all_ids.to(torch.int32).numpy().astype("<u4").tobytes(),
        logprobs=torch.cat(values).numpy().astype("<f4").tobytes(),
        ranks=torch.cat(ranks).to(torch.int32).numpy().astype("<u4").tobytes(),
    )
