"""`engine.args` of a cluster file as vLLM's command line, so that any argument of vLLM's can be given. Pure."""

import json
from collections.abc import Mapping

from kvcore.config.schema import ModelConfig


def command_line(args: Mapping[str, object], model: ModelConfig, folder: str) -> list[str]:
    """vLLM's arguments: those of the file, then those that kvferry sets (kvcore.config.checks keeps them apart).

    `true` is a flag, `false` its `--no-` form, null leaves the argument out, a list gives words, a mapping JSON.
    """
    words: list[str] = []
    for name, value in args.items():
        words += _words(name.lstrip("-").replace("_", "-"), value)
    words += ["--model", folder, "--served-model-name", model.name, "--dtype", model.dtype]
    if model.max_context is not None:
        words += ["--max-model-len", str(model.max_context)]
    return [*words, "--disable-hybrid-kv-cache-manager"]


def _words(name: str, value: object) -> list[str]:
    match value:
        case None:
            return []
        case True:
            return [f"--{name}"]
        case False:
            return [f"--no-{name}"]
        case list():
            return [f"--{name}", *(str(item) for item in value)]
        case dict():
            return [f"--{name}", json.dumps(value)]
        case _:
            return [f"--{name}", str(value)]
