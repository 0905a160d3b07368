"""Where prompts leave all earlier ones, though what follows was in earlier prompts too. Pure; it keeps hashes alone.

A date or an id near the start of a prompt makes all that follows new to a cache of beginnings. It shows in this: runs
of 16 tokens that the prompt has behind that place were in earlier prompts, there or elsewhere. One in eight runs is
looked at, chosen by its hash, so that it is the same ones wherever they stand (Manber, "Finding similar files in a
large file system", 1994).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.cache.prefixes import EARLY, Hashes, KnownHashes, Tokens, mixed

_RUN = 16
_LOOKED_AT = 4096
_BASE = 0xD6E8FEB86659FD93
_CHOSEN = np.uint64((1 << 64) // 8)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of one prompt. `repeated_tokens`: of those that are new behind their beginning, about so many were in earlier
    prompts. `left_at`: where it left all earlier ones, if that is at least half of them; else None."""

    repeated_tokens: int
    left_at: int | None


class RepeatedText:
    """Runs of tokens of earlier prompts and answers, the newer ones."""

    def __init__(self, num_places: int) -> None:
        self._runs = KnownHashes(num_places)

    def look(self, tokens: Tokens, known: int, prompt_tokens: int) -> Divergence:
        """At a prompt, with its answer behind its `prompt_tokens`, of which the first `known` are an earlier prompt's
        beginning. It is an earlier one from now on. Of new tokens the first 4096 are looked at, and stand for all."""
        places, runs = chosen_runs(tokens[known : known + _LOOKED_AT])
        asked = runs[: int(np.searchsorted(places, prompt_tokens - known - _RUN, side="right"))]
        repeated = 0
        if len(asked):
            repeated = round((prompt_tokens - known) * int(np.count_nonzero(self._runs.has(asked))) / len(asked))
        self._runs.add(runs)
        return Divergence(repeated, _rounded(known) if 0 < prompt_tokens - known <= 2 * repeated else None)


def chosen_runs(tokens: Tokens) -> tuple[npt.NDArray[np.int64], Hashes]:
    """Of every run of 16 tokens a hash, and one in eight of these: where they begin, and they."""
    if len(tokens) < _RUN:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
    runs: Hashes = tokens.astype(np.uint64) + np.uint64(1)
    width, factor = 1, _BASE
    while width < _RUN:  # a polynomial of the run's tokens, by doubling
        runs = runs[:-width] * np.uint64(factor) + runs[width:]
        width, factor = 2 * width, factor * factor % (1 << 64)
    runs = mixed(runs)
    places = np.flatnonzero(runs < _CHOSEN)
    return places, runs[places]


def _rounded(place: int) -> int:
    """Exact among the first tokens, then down to a power of two: to be counted by."""
    return place if place < EARLY else 1 << (place.bit_length() - 1)


def where_most_leave(left_at: Mapping[int, int]) -> tuple[float, int, int]:
    """(share of the prompts counted, that leave within this many tokens, the token at which most of all leave). The
    number of tokens is the smallest power of two by which half have left, 0 for the share if there are none."""
    total, within = sum(left_at.values()), 1
    if not total:
        return 0.0, 0, 0

    def left(bound: int) -> int:
        return sum(count for place, count in left_at.items() if place < bound)

    while 2 * left(within) < total:
        within *= 2
    return left(within) / total, within, max(left_at, key=lambda place: (left_at[place], -place))
