"""What a model's folder says of its answers: the dialect that they are written in, and how it wants to be sampled."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvcore.config.schema import ClusterConfig
from kvcore.errors import ModelLoadError
from kvcore.model_folder import find_folder, read_json
from router.parsing.dialects import Dialect, find_dialect
from router.text.reasoning_marks import ReasoningMarks, reasoning_marks
from router.text.tokenizer import Tokenizer

_FILE = "generation_config.json"


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What holds where a request says nothing. `max_new_tokens`: of a chat; None: as many as fit."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    def others(self) -> dict[str, float]:
        """Those that are not OpenAI's."""
        neutral = SamplingDefaults()
        names = self.__struct_fields__
        return {name: value for name in names if (value := getattr(self, name)) != getattr(neutral, name)}


@dataclass(frozen=True, slots=True)
class ModelHabits:
    """`dialect`: None: its answers are text."""

    dialect: Dialect | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    marks: ReasoningMarks | None = None
    """None: it does not reason before it answers."""


def model_habits(config: ClusterConfig, tokenizer: Tokenizer) -> ModelHabits:
    """Of the configured model. Blocking. Raises ConfigError, ModelLoadError."""
    dialect = find_dialect(config.model.parser, tokenizer.chat_source)
    if not config.model.generation_config or not tokenizer.digest:  # a model of the simulated engine has no folder
        return ModelHabits(dialect, marks=reasoning_marks(dialect, tokenizer))
    sampling = read_sampling(find_folder(config.model.path, (_FILE,)))
    return ModelHabits(dialect, sampling, reasoning_marks(dialect, tokenizer))


def read_sampling(folder: Path) -> SamplingDefaults:
    """As vLLM takes them from `generation_config.json`: what is there and not null. Raises ModelLoadError."""
    file = folder / _FILE
    if not file.is_file():
        return SamplingDefaults()
    said = read_json(file, "it says how the model wants to be sampled")
    wanted = {name: said[name] for name in SamplingDefaults.__struct_fields__ if said.get(name) is not None}
    try:
        return msgspec.convert(wanted, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{file}: {error}. Correct it, or set model.generation_config: false") from error
