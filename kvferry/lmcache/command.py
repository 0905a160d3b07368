"""`kvferry config from-lmcache FILE`, and what `kvferry serve` obeys of LMCache's environment."""

import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from kvcore.errors import ConfigError
from kvferry.lmcache.draft import Draft
from kvferry.lmcache.importer import CONFIG_FILE, is_spoken, read_lmcache


def run_from_lmcache(file: Path, environment: Mapping[str, str]) -> int:
    """Print the part of a cluster file, with the notes as comments before it. 1: a key was refused."""
    draft = _read(file, environment)
    tree = draft.whole()
    lines = [f"# {note}" for note in draft.notes]
    lines.append("# A part of a cluster file; it has `cluster`, `model`, `engine` and `nodes` besides: docs/config.md")
    sys.stdout.write("\n".join(lines) + "\n")
    if tree:
        sys.stdout.write(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120))
    for note in draft.refused():
        sys.stderr.write(f"kvferry: {file}: {note}\n")
    return 1 if draft.refused() else 0


def from_environment(environment: Mapping[str, str]) -> Draft | None:
    """What the environment and the file it names ask for; None: nothing. Raises ConfigError, for a refused key too."""
    if not is_spoken(environment):
        return None
    named = environment.get(CONFIG_FILE, "").strip()
    draft = _read(Path(named), environment) if named else _parsed(None, environment, "LMCACHE_*")
    if draft.refused():
        told = "\n".join(f"  {note}" for note in draft.refused())
        raise ConfigError(f"LMCache's settings{f' ({named})' if named else ''} ask for what is not there:\n{told}")
    return draft


def _read(file: Path, environment: Mapping[str, str]) -> Draft:
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    return _parsed(text, environment, str(file))


def _parsed(text: str | None, environment: Mapping[str, str], source: str) -> Draft:
    try:
        return read_lmcache(text, environment)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.message}") from None
