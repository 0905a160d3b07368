"""Where tests meet a GPU: the device of those that need one, and whether the vLLM that is here computes on one."""

from __future__ import annotations  # torch is loaded when a device is asked for, and not before

from typing import TYPE_CHECKING

import pytest

from kvferry.vllm_here import installed_vllm

if TYPE_CHECKING:
    import torch

GPU_SHARE = 0.2
"""Of a GPU's memory, for each vLLM of a test: one refuses to start where less than its part is free."""


def cuda_device() -> torch.device:
    """The first GPU. Skips the test that asks where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device("cuda", 0)


def vllm_on_gpu() -> bool:
    """Whether the vLLM of this environment is one for GPUs."""
    build = installed_vllm()
    return build is not None and build.platform == "gpu"
