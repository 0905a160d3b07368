"""`model.adapters` of a cluster file for vLLM: what is read of their folders, and the arguments that they take.

Needs no vLLM. All adapters are loaded when the engine starts and stay in its processes' main memory, so that what is
computed with one is of the files whose digest names its KV.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.provenance import DIGEST_CACHE, FileStamp, weights_digest
from kvcore.chunk_keys import adapter_identity
from kvcore.config.vllm_options import argument
from kvcore.errors import ModelLoadError
from kvcore.model_folder import find_folder, read_json
from nodeapi.adapters import ServedAdapter

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max-lora-rank`."""
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """`rank`: the highest of its matrices. `stamps`: of its files, as they were when their digest was taken."""

    served: ServedAdapter
    folder: Path
    rank: int
    stamps: Mapping[Path, FileStamp]


def read_adapters(adapters: Mapping[str, str]) -> list[ReadAdapter]:
    """By the names and paths of the cluster file. Blocks: reads the files unless their digests are cached.

    Raises ModelLoadError that names the adapter.
    """
    return [_read(name, path) for name, path in adapters.items()]


def adapter_files(folder: Path) -> list[Path]:
    """The adapter's configuration, then its weights. Raises ModelLoadError."""
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if not (folder / CONFIG).is_file() or weights is None:
        raise ModelLoadError(
            f"{folder} is no LoRA adapter in PEFT's format: it takes {CONFIG} and {' or '.join(WEIGHTS)}"
        )
    return [folder / CONFIG, weights]


def adapter_arguments(given: Mapping[str, object], adapters: Sequence[ReadAdapter]) -> Iterator[str]:
    """vLLM's command line for them. `max-lora-rank` and `max-loras` may be `given` in `engine.args`."""
    if not adapters:
        return
    yield "--enable-lora"
    if argument(given, "max-lora-rank") is None:
        highest = max(one.rank for one in adapters)
        yield from ("--max-lora-rank", str(next((rank for rank in _RANKS if rank >= highest), highest)))
    at_once = argument(given, "max-loras")
    if at_once is None:
        at_once = min(len(adapters), _AT_ONCE)
        yield from ("--max-loras", str(at_once))
    kept = max(len(adapters), at_once if isinstance(at_once, int) else 0)
    yield from ("--max-cpu-loras", str(kept))


def _read(name: str, path: str) -> ReadAdapter:
    try:
        folder = find_folder(path, (CONFIG, *WEIGHTS))
        files = adapter_files(folder)
        stamps = {file: FileStamp.of(file) for file in files}
        config = read_json(files[0], "the adapter's rank")
        digest = weights_digest(files, DIGEST_CACHE)
    except ModelLoadError as error:
        raise ModelLoadError(f"model.adapters.{name}: {error.message}") from error
    served = ServedAdapter(name=name, identity=adapter_identity(name, bytes.fromhex(digest)), path=path)
    return ReadAdapter(served, folder, _rank(name, config), stamps)


def _rank(name: str, config: Mapping[str, object]) -> int:
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise ModelLoadError(f"model.adapters.{name}: {CONFIG} gives no rank `r`: is it a LoRA adapter?")
    return max(rank for rank in ranks if isinstance(rank, int))
