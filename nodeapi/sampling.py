"""How tokens are picked: what a decode leg is asked, and which nodes can be asked it.

Owns since which version of the nodes' API each field may be sent. A field that is added later has a default that asks
for nothing and is not sent; `SINCE` says with which version it came.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter

import msgspec

from nodeapi.grammars.grammar import Grammar

SINCE: dict[str, int] = {
    "allowed_token_ids": 3,
    "bad_words": 3,
    "bad_words_token_ids": 3,
    "extra_args": 3,
    "grammar": 3,
    "logprob_token_ids": 3,
    "prompt_logprobs": 3,
    "thinking_token_budget": 3,
}
"""Fields of SamplingParams that nodes of an older version refuse; they know the others."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to pick tokens. `temperature` 0 is greedy. Random numbers are a function of (seed, index, position) alone, so
    another engine can continue a sequence and draw what this one would have drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    seed: int = 0
    """The router draws one where the client gave none."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    max_tokens: int
    """Of the whole completion, tokens already emitted included."""
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no logprobs. k: of the sampled token and of the k likeliest ones, before temperature, as OpenAI has it."""
    n: int = 1
    allowed_token_ids: list[int] = []
    """No other token is picked. Empty: all may be."""
    grammar: Grammar | None = None
    """What the answer must follow, whatever the fields above say. None: it is free."""
    bad_words: list[str] = []
    """For servers that make tokens of them themselves."""
    bad_words_token_ids: list[list[int]] = []
    """The tokens of `bad_words`: sequences of which the last is not picked after the others, which are of the answer.
    None is empty."""
    thinking_token_budget: int | None = None
    """Tokens of reasoning after which the model is made to end it."""
    extra_args: dict[str, str | int | float | list[str | int | float]] = {}
    """For what was plugged into an engine."""
    prompt_logprobs: int | None = None
    """None: none. k: of each token of the prompt but the first, and of the k likeliest ones in its place, before the
    first delta with a token."""
    logprob_token_ids: list[int] = []
    """With `logprobs`: these are what is told beside the sampled token, in this order, and not the likeliest ones."""

    def banned_after(self, output: Sequence[int]) -> set[int]:
        """The tokens that would complete one of `bad_words_token_ids` after `output`, the answer so far."""
        return {
            word[-1]
            for word in self.bad_words_token_ids
            if len(word) == 1 or list(output[1 - len(word) :]) == word[:-1]
        }

    @property
    def asks(self) -> frozenset[str]:
        """The fields of SINCE that ask for something: a node must know them all."""
        if _values_of(self) == _DEFAULT_VALUES:  # as most requests: a tenth of the time that looking at each takes
            return _NOTHING
        return frozenset([name for name, default in _DEFAULTS if getattr(self, name) != default])


def lacking(protocol: int, said: Iterable[str] = ()) -> frozenset[str]:
    """The fields that a node of this version of the API cannot be sent, or whose engine has `said` that it lacks them
    (`EngineInfo.lacks`)."""
    return frozenset(SINCE.keys() & set(said) | {name for name, since in SINCE.items() if protocol < since})


_FIELDS = {field.name: field for field in msgspec.structs.fields(SamplingParams)}
_DEFAULTS = [
    (name, _FIELDS[name].default_factory() if _FIELDS[name].default is msgspec.NODEFAULT else _FIELDS[name].default)
    for name in SINCE
]
_DEFAULT_VALUES = tuple(default for _, default in _DEFAULTS)
_values_of = attrgetter(*SINCE)
_NOTHING: frozenset[str] = frozenset()
