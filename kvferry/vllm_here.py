"""What this machine has for vLLM, found without importing vLLM or torch: its build, GPUs, cores. And how vLLM writes
sizes and lists of cores.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvcore.config.vllm_options import argument

OLDEST, TOO_NEW = (0, 32), (0, 34)
"""Versions that the connector was written against: OLDEST <= version < TOO_NEW."""
_PROC_GPUS = Path("/proc/driver/nvidia/gpus")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class VllmBuild:
    """The vLLM that is installed where this process runs."""

    version: str
    platform: Literal["cpu", "gpu"]
    """`gpu`: any that needs one."""

    @property
    def supported(self) -> bool:
        """Whether the connector knows this version."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return found is not None and OLDEST <= (int(found[1]), int(found[2])) < TOO_NEW


def installed_vllm() -> VllmBuild | None:
    """The vLLM that is installed; None where there is none."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None
    return VllmBuild(version, "cpu" if "cpu" in version.partition("+")[2] else "gpu")


def cuda_devices(proc_gpus: Path = _PROC_GPUS) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES may name here: what it names already, else the indexes of all GPUs. Blocking."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))
    count = _count_by_smi()
    if count is None:
        count = len(list(proc_gpus.iterdir())) if proc_gpus.is_dir() else 0
    return tuple(str(index) for index in range(count))


def _count_by_smi(timeout_s: float = 10.0) -> int | None:
    """How many GPUs nvidia-smi lists; None where it cannot be asked."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        said = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=timeout_s, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return sum(line.startswith("GPU ") for line in said.splitlines())


def cores() -> tuple[int, ...]:
    """The cores that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def split_cores(all_cores: Sequence[int], engines: int, ranks: int = 1) -> list[str]:
    """VLLM_CPU_OMP_THREADS_BIND of each engine: cores of its own, the same number for each rank.

    An engine with 4 cores or more a rank leaves one of a rank's free, for its processes that do not compute. With fewer
    cores than ranks the ranks share them.
    """
    parts = engines * ranks
    each = len(all_cores) // parts
    if each == 0:
        groups = [[all_cores[part % len(all_cores)]] for part in range(parts)]
    else:
        used = each - 1 if each >= 4 else each
        groups = [list(all_cores[part * each : part * each + used]) for part in range(parts)]
    texts = [core_list(group) for group in groups]
    return ["|".join(texts[engine * ranks : (engine + 1) * ranks]) for engine in range(engines)]


def core_list(group: Sequence[int]) -> str:
    """`0-3,8` of sorted numbers."""
    runs: list[tuple[int, int]] = []
    for core in group:
        if runs and runs[-1][1] == core - 1:
            runs[-1] = (runs[-1][0], core)
        else:
            runs.append((core, core))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_cores(text: str) -> set[int] | None:
    """The cores of all ranks of a VLLM_CPU_OMP_THREADS_BIND; None: `auto` or `nobind`. Raises ValueError."""
    if text in ("auto", "nobind"):
        return None
    found: set[int] = set()
    for part in re.split(r"[|,]", text):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a list of cores such as 0-3 or 0,1|2,3")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def ranks_of(args: Mapping[str, object]) -> int:
    """How many ranks, each with a GPU or cores of its own, an engine has by these arguments of vLLM."""
    return parse_size(argument(args, "tensor-parallel-size")) or 1


def parse_size(value: object) -> int | None:
    """Bytes of a number as vLLM's command line takes it (`300M` is binary, `300m` decimal); None: it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", str(value).strip())
    if match is None or isinstance(value, bool):
        return None
    return int(float(match[1]) * _UNITS.get(match[2], 1))
