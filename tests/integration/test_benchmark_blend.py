"""The forward pass of benchmarks.blend is the model's, and its ways reuse what they say. Tiny models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.blend import BLEND, FULL, STEPS, judged, rows_of
from benchmarks.blend_reference import Reference
from benchmarks.blend_samples import Sample
from tests.support.tiny_models import make_tiny_model

IDS = [3 + (7 * at) % 500 for at in range(60)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As the benchmark runs."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is. A fresh Qwen's biases are zeros: they get numbers."""
    folder = make_tiny_model(request.param, tmp_path_factory.mktemp("blend") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.copy_(torch.linspace(-1, 1, len(weight)))
    model.save_pretrained(folder)
    return folder


def test_the_forward_pass_is_the_models(folder: Path) -> None:
    reference, model = Reference(folder), AutoModelForCausalLM.from_pretrained(folder)
    expected = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    kv, said = reference.prefill(IDS)
    torch.testing.assert_close(said, expected[-1], atol=1e-4, rtol=0)
    front, _ = reference.prefill(IDS[:40])
    torch.testing.assert_close(reference.follow([front, front], IDS[40:])[1], expected[40:], atol=1e-4, rtol=0)
    for run in (lambda kv: reference.patch(IDS, kv, torch.arange(60)), lambda kv: reference.blend(IDS, kv, 1.0, 50)):
        wrong = [(torch.ones_like(k), torch.ones_like(v)) for k, v in kv]
        torch.testing.assert_close(run(wrong)[1], said, atol=1e-4, rtol=0)


def test_a_key_that_is_turned_is_that_of_the_other_place(folder: Path) -> None:
    reference = Reference(folder)
    (early, _), (late, _) = reference.prefill([9] * 5)[0][0], reference.prefill([9] * 45)[0][0]
    torch.testing.assert_close(reference.turned(early, 40), late[40:], atol=1e-5, rtol=0)


def test_a_document_right_behind_the_header_is_exact_and_others_are_judged(folder: Path) -> None:
    reference, tokenizer = Reference(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    alone = Sample("faq", IDS[:5], [IDS[5:45]], IDS[45:])
    rows = {str(row["way"]): row for row in rows_of("m", list(judged(reference, tokenizer, alone)))}
    assert len(rows) == 11 and rows[FULL]["share"] == 1 and BLEND in rows
    assert rows["behind the header, first 0"]["agreement"] == 1 and rows["behind the header, first 0"]["kl"] == 0
    assert float(str(rows["turned, first 0"]["kl"])) > 0
    two = Sample("stories", IDS[:5], [IDS[5:25], IDS[25:45]], IDS[45:], "never said")
    outcomes = {outcome.way: outcome for outcome in judged(reference, tokenizer, two)}
    assert outcomes["behind the header, first 0"].kl > 0 and outcomes[FULL].kl == outcomes[FULL].fact == 0
    assert 0 < outcomes[BLEND].same <= 1 and round(outcomes[BLEND].same * STEPS, 3).is_integer()
