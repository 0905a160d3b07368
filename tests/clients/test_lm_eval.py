"""lm-eval scores a small task of its own making, and finds what a direct forward of the model finds."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[2]
QUESTIONS: list[dict[str, Any]] = [
    {"question": "The capital of France is", "choices": ["Paris", "Berlin", "a cheese"], "answer": 0},
    {"question": "Two and two make", "choices": ["seven", "four", "blue"], "answer": 1},
    {"question": "A dog is an", "choices": ["opera", "idea", "animal"], "answer": 2},
    {"question": "In winter one sees ❄ falling; it is called", "choices": ["snow", "bread", "Zürich"], "answer": 0},
    {"question": "The sun rises in the", "choices": ["west", "east"], "answer": 1},
    {"question": "Water freezes at a temperature of", "choices": ["zero degrees", "a thousand degrees"], "answer": 0},
]
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 12, "Naïve café owners in Zürich wrote 日本語 on the door."]
CLOSE = 5e-3
"""Of a sum over a text: computing in other parts moves each logit by 7e-5."""


def task(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> str:
    """Write a task of lm-eval's and its data, for nothing is fetched here."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **dataset, **fields}))
    return name


def direct(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """The demo model's folder, and by a forward over each whole text the logprob of the second part, and whether that
    is what greedy decoding would say."""
    python = os.environ.get("KVFERRY_PYTHON", str(ROOT / ".venv/bin/python"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command, asked = [python, "-m", "support.loglikelihoods"], json.dumps(pairs)
    done = subprocess.run(command, cwd=ROOT, env=environment, input=asked, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def evaluated(url: str, tasks: list[str], folder: Path, **arguments: object) -> dict[str, Any]:
    given = {"model": "demo", "base_url": f"{url}/completions", "tokenizer_backend": "huggingface", **arguments}
    given |= {"tokenizer": direct([])["folder"], "num_concurrent": 2, "max_retries": 1, "max_length": 2048}
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=given,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    return dict(results)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_task_of_choices_is_scored_as_by_the_model_itself(torch_url: str, tmp_path: Path, batch: int) -> None:
    name = task(
        tmp_path,
        "small_choices",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    results = evaluated(torch_url, [name], tmp_path, batch_size=batch)
    samples = results["samples"][name]
    pairs = [(text, said) for one in samples for text, said in [tuple(asked) for asked in one["arguments"]]]
    told = [tuple(answer) for one in samples for answer in one["filtered_resps"]]
    true = direct(pairs)["scores"]
    assert len(told) == sum(len(one["choices"]) for one in QUESTIONS)
    for (logprob, greedy), (own, is_greedy) in zip(told, true, strict=True):
        assert float(logprob) == pytest.approx(own, abs=CLOSE) and greedy == is_greedy
    scores, right = iter(own for own, _ in true), 0
    for one in QUESTIONS:
        of_choices = [next(scores) for _ in one["choices"]]
        right += of_choices.index(max(of_choices)) == one["answer"]
    assert results["results"][name]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert right >= 3, "the model knows some of it, so that the choices matter"


def test_whole_texts_have_the_perplexity_that_the_model_gives_them(torch_url: str, tmp_path: Path) -> None:
    name = task(
        tmp_path,
        "small_texts",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    samples = evaluated(torch_url, [name], tmp_path, batch_size=1)["samples"][name]
    begin = AutoTokenizer.from_pretrained(direct([])["folder"]).bos_token
    for one, (own, _) in zip(samples, direct([(begin, text) for text in TEXTS])["scores"], strict=True):
        assert float(one["filtered_resps"][0]) == pytest.approx(own, abs=CLOSE)
