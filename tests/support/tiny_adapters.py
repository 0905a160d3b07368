"""A tiny seeded LoRA adapter in PEFT's format for a model of `support.tiny_models`, which peft is not needed for."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4


def make_tiny_adapter(model: Path, folder: Path, *, seed: int) -> Path:
    """Write one for `model` into `folder` and return it. It is strong enough to change most greedy answers."""
    config = json.loads((model / "config.json").read_text())
    dice = torch.Generator().manual_seed(seed)
    hidden, head = config["hidden_size"], config["head_dim"]
    widths = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    weights: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, width in widths.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden, generator=dice) * 0.2
            weights[f"{name}.lora_B.weight"] = torch.randn(width, RANK, generator=dice) * 0.2
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "bias": "none"}
    (folder / "adapter_config.json").write_text(
        json.dumps({**said, "r": RANK, "lora_alpha": 8, "target_modules": list(widths), "modules_to_save": None})
    )
    return folder
