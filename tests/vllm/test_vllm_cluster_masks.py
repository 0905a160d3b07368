"""Fields that vLLM's own sampler obeys, through the whole cluster: the tokens that may be picked and that may not."""

from itertools import pairwise

import httpx
import pytest
from support.cluster import ClusterHandle

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]
WORD = "zq"
PROMPT = [(7 * number) % 200 + 3 for number in range(90)]


async def tokens_of(subject: ClusterHandle, **fields: object) -> list[int]:
    more = {"max_tokens": 12, "temperature": 0, "return_token_ids": True, "ignore_eos": True, **fields}
    answer = await subject.complete(PROMPT, **more)
    return list(answer["choices"][0]["token_ids"])


async def test_only_allowed_tokens_are_picked(subject: ClusterHandle) -> None:
    allowed = [11, 23, 190]
    assert set(await tokens_of(subject)) - set(allowed), "else nothing is shown"
    assert set(await tokens_of(subject, allowed_token_ids=allowed)) <= set(allowed)
    drawn = await tokens_of(subject, allowed_token_ids=allowed, temperature=1, seed=3, max_tokens=40)
    assert set(drawn) == set(allowed)


async def test_a_bad_word_is_not_written(subject: ClusterHandle) -> None:
    """One whose tokens are drawn one after the other, were they let; each by itself still is."""
    async with httpx.AsyncClient(base_url=subject.url, timeout=60) as http:
        asked = {"prompt": WORD, "add_special_tokens": False}
        word = (await http.post("/tokenize", json=asked)).json()["tokens"]
    assert len(set(word)) == len(word) == 2
    drawing = {"allowed_token_ids": word, "temperature": 1, "seed": 3, "max_tokens": 40}
    free, without = await tokens_of(subject, **drawing), await tokens_of(subject, bad_words=[WORD], **drawing)
    assert tuple(word) in set(pairwise(free))
    assert tuple(word) not in set(pairwise(without)) and set(without) == set(word)


async def test_what_an_engine_cannot_do_is_refused_by_the_clients_name_for_it(subject: ClusterHandle) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "thinking_token_budget": 3}
    async with httpx.AsyncClient(base_url=subject.url, timeout=60) as http:
        reply = await http.post("/v1/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "thinking_token_budget")
        plain = await http.post("/v1/completions", json={**body, "thinking_token_budget": -1, "vllm_xargs": {"a": 1}})
        assert plain.status_code == 200, plain.text
