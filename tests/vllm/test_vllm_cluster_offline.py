"""kvferry.LLM on real vLLM beside a cluster that serves: each finds what the other has computed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.cluster import ClusterHandle
from support.vllm_offline import ask, cached, check_answers, is_full, open_llm, run_offline
from support.vllm_questions import BLOCK, NEW_TOKENS, Questions, prompt_of
from support.vllm_reference import References

from kvferry.offline.cluster import write_cluster

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="session")]

FROM_THE_CLUSTER, TO_THE_CLUSTER = prompt_of(700, 520), prompt_of(701, 521)


@pytest.fixture(scope="module")
def questions(single: References) -> Questions:
    return Questions(single, [FROM_THE_CLUSTER, TO_THE_CLUSTER], NEW_TOKENS)


def from_and_to_the_cluster(model: str, file: str) -> dict[str, Any]:
    with open_llm(model, store=file, segment=None) as llm:
        return {"had": ask(llm, [FROM_THE_CLUSTER], NEW_TOKENS), "gave": ask(llm, [TO_THE_CLUSTER], NEW_TOKENS)}


async def test_kv_goes_from_a_serving_cluster_to_the_program_and_back(
    subject: ClusterHandle, tiny: Path, questions: Questions, tmp_path: Path
):
    await questions.ask(subject, FROM_THE_CLUSTER)
    file = tmp_path / "cluster.yaml"
    write_cluster(subject.config, file)
    shown = await asyncio.to_thread(run_offline, from_and_to_the_cluster, tiny, file)
    check_answers(questions, [FROM_THE_CLUSTER], shown["had"], "from the cluster")
    check_answers(questions, [TO_THE_CLUSTER], shown["gave"], "to the cluster")
    assert is_full(*cached(shown["had"]), len(FROM_THE_CLUSTER))
    answer = await questions.ask(subject, TO_THE_CLUSTER)
    assert answer.usage["prompt_tokens_details"]["cached_tokens"] >= len(TO_THE_CLUSTER) - BLOCK
