"""What the demo model itself says of texts, for clients in another environment: `python -m support.loglikelihoods`.

Reads a JSON list of pairs of texts, and writes JSON: `folder` of the model, and as `scores` for each pair the logprob
of the second text behind the first, and whether each of its tokens is the likeliest.
"""

import json
import sys

import torch
import transformers

from kvferry.demo.model import prepare_demo_model


def main() -> None:
    """See above."""
    pairs: list[tuple[str, str]] = json.load(sys.stdin)
    folder = prepare_demo_model()
    scores: list[tuple[float, bool]] = []
    if pairs:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for before, text in pairs:
            ids, known = tokenizer(before + text).input_ids, len(tokenizer(before).input_ids)
            with torch.inference_mode():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)[known - 1 : -1]
            own = torch.tensor(ids[known:])
            told = logprobs.gather(1, own[:, None])[:, 0]
            scores.append((float(told.sum()), bool((logprobs.argmax(dim=-1) == own).all())))
    json.dump({"folder": str(folder), "scores": scores}, sys.stdout)


if __name__ == "__main__":
    main()
