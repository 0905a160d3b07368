"""Where a model's folder keeps its chat templates, as transformers looks for them. Reads files."""

import json
from collections.abc import Mapping
from pathlib import Path


def template_sources(folder: Path, settings: Mapping[str, object]) -> dict[str, str]:
    """The templates by their names; that of a model with one is `default`. Files of their own count before those in
    `settings`, which are tokenizer_config.json's. Raises ValueError where a file cannot be read."""
    own = folder / "chat_template.jinja"
    sources = {"default": _read(own)} if own.is_file() else {}
    sources |= {file.stem: _read(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return sources or _sources_of(settings.get("chat_template")) or _sources_of(_of_processor(folder))


def _sources_of(value: object) -> dict[str, str]:
    """Of one template, a list of named ones, or an object of them."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if not isinstance(value, dict):
        return {}
    return {name: text for name, text in value.items() if isinstance(name, str) and isinstance(text, str)}


def _of_processor(folder: Path) -> object:
    """What models that also see pictures may have instead."""
    file = folder / "chat_template.json"
    value = json.loads(_read(file)) if file.is_file() else None
    return value.get("chat_template") if isinstance(value, dict) else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(str(error)) from error
