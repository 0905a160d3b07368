"""A model's folder: found on the disk or fetched from the hub, and its JSON files read. Knows no architecture."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcore.errors import ModelLoadError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "chat_template.json", "*.jinja")


_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")


DOWNLOAD_AGAIN = "download or convert the model again"


def find_folder(path: str, hub_files: Sequence[str] = _HUB_FILES) -> Path:
    """The local folder of `path`. A model on the hub is downloaded: files of these patterns. Raises ModelLoadError."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelLoadError(f"the model path is not a folder: {folder}. Give the folder that holds its config.json")
    if not _HUB_ID.fullmatch(path):
        raise ModelLoadError(f"the model folder does not exist: {folder}. Correct model.path or put the model there")
    return _download(path, hub_files)


def file_digest(file: Path) -> str:
    """Hex SHA-256 of a file's contents. Raises ModelLoadError."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"{file.name} cannot be read: {file}: {error}. Download the model again") from error


def _download(hub_id: str, files: Sequence[str]) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelLoadError(
            f"there is no folder {hub_id!r} here, and without the package huggingface-hub it cannot be downloaded. "
            "Correct model.path, or `pip install 'kvferry[torch]'`"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(files)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ModelLoadError(
            f"there is no folder {hub_id!r} here and it could not be had from the Hugging Face hub either: "
            f"{error}. Correct model.path, or download the model where there is a network"
        ) from error


def read_json(file: Path, purpose: str) -> dict[str, Any]:
    """The JSON object in `file`. Raises ModelLoadError that names it and its `purpose`."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(
            f"{file.name} is missing: {file} ({purpose}). Is this a model folder in Hugging Face format? "
            f"{DOWNLOAD_AGAIN}"
        ) from None
    except OSError as error:
        raise ModelLoadError(f"{file.name} cannot be read: {file}: {error}. Correct its permissions") from error
    except ValueError as error:  # broken JSON and broken UTF-8
        raise ModelLoadError(f"{file.name} is corrupt: {file}: {error} ({purpose}). {DOWNLOAD_AGAIN}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file.name} is corrupt: {file} holds no JSON object ({purpose}). {DOWNLOAD_AGAIN}")
    return content
