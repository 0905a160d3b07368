"""The simulated model's arithmetic: KV records chained over the tokens, and tokens drawn from a digest of all records.

One wrong byte anywhere in a sequence's KV changes every record after it and the next token. A record has its position
laid over it (exclusive or), so that it can be turned to another one, as RoPE's K can.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from nodeapi.grammars.matcher import Mask
from nodeapi.messages import TokenLogprob
from nodeapi.prompt_logprobs import PromptRow
from nodeapi.sampling import SamplingParams

RECORD_UNIT = 16
_VARIANTS = 1 << 16
_FIRST = 16


class Arithmetic:
    """For one version of the weights. `record_bytes`: KV of one token, a multiple of 16. `adapter`: the identity of the
    one that it stands for; empty: the model alone."""

    def __init__(self, weights_version: str, record_bytes: int, vocab_size: int, adapter: str = "") -> None:
        if record_bytes <= 0 or record_bytes % RECORD_UNIT:
            raise ValueError(f"bytes_per_token is {record_bytes}, not a multiple of {RECORD_UNIT}")
        self._weights = xxhash.xxh3_64_intdigest(weights_version.encode())
        self._seed = xxhash.xxh3_64_intdigest(adapter.encode(), seed=self._weights) if adapter else self._weights
        self._repeats = record_bytes // RECORD_UNIT
        self._vocab_size = vocab_size
        self._overs: list[int] = []

    def record(self, previous: bytes | memoryview, token: int, position: int) -> bytes:
        """KV of `token` at `position`, after the record `previous` (empty at position 0)."""
        chained = xxhash.xxh3_128_intdigest(bytes(previous) + token.to_bytes(8, "little"), seed=self._seed)
        over = self._overs[position] if position < len(self._overs) else self._over(position)
        return (chained ^ over).to_bytes(RECORD_UNIT, "little") * self._repeats

    def turned(self, record: bytes | memoryview, computed_at: int, position: int) -> bytes:
        """The record of a token that stands at `position`, of one that was computed at `computed_at`."""
        over = (self._over(computed_at) ^ self._over(position)).to_bytes(RECORD_UNIT, "little") * self._repeats
        return (int.from_bytes(record, "little") ^ int.from_bytes(over, "little")).to_bytes(len(over), "little")

    def _over(self, position: int) -> int:
        while len(self._overs) <= position:
            at = len(self._overs).to_bytes(8, "little")
            self._overs.append(xxhash.xxh3_128_intdigest(at, seed=self._weights))
        return self._overs[position]

    def draw(
        self, digest: int, params: SamplingParams, index: int, output: Sequence[int], mask: Mask | None = None
    ) -> int:
        """The token after KV with 128-bit `digest` and the answer so far. Greedy: of the digest alone; otherwise also
        of seed, index and position, whatever the temperature. There are no logits: penalties, bias and top-k do not
        change it. `mask`: of the tokens that may come, if not all may; it has the last word. A token that must not be
        drawn gives its place to the next one that may."""
        number = digest
        if params.temperature > 0:
            drawn = f"{digest}/{params.seed}/{index}/{len(output)}".encode()
            number = int(xxhash.xxh3_64_intdigest(drawn))
        allowed: Sequence[int] = params.allowed_token_ids or range(self._vocab_size)
        if mask is not None:
            masked = mask.nonzero()[0].tolist()
            if number & 1:  # vocabularies have their punctuation first: so texts within a grammar come to an end
                masked = masked[:_FIRST]
            number >>= 1
            wanted = set(params.allowed_token_ids)
            allowed = [token for token in masked if token in wanted] or masked
        first = number % len(allowed)
        if not params.bad_words_token_ids:
            return allowed[first]
        banned = params.banned_after(output)
        some = (allowed[(first + more) % len(allowed)] for more in range(len(allowed)))
        return next((token for token in some if token not in banned), allowed[first])

    def logprob(self, digest: int, token: int, params: SamplingParams) -> TokenLogprob | None:
        """A made-up distribution that is the same for the same KV and token, likeliest first. None if not asked for."""
        if params.logprobs is None:
            return None
        chosen, top = self._told(digest, token, params.logprobs)
        if params.logprob_token_ids:
            top = [(other, chosen - (other - token) % self._vocab_size) for other in params.logprob_token_ids]
        return TokenLogprob(logprob=chosen, top=top)

    def distribution(self, digest: int) -> npt.NDArray[np.float32]:
        """A made-up one: half of all is on the token that a greedy draw takes."""
        rest = math.log(0.5 / max(1, self._vocab_size - 1))
        whole = np.full(self._vocab_size, rest, dtype=np.float32)
        whole[digest % self._vocab_size] = math.log(0.5)
        return whole

    def prompt_row(self, record: bytes | memoryview, token: int, count: int) -> PromptRow:
        """As `logprob`, of a prompt's `token` behind one whose KV is `record`: it is always the likeliest one."""
        chosen, top = self._told(int.from_bytes(record[:RECORD_UNIT], "little"), token, count)
        return PromptRow(token, chosen, 1, top)

    def _told(self, digest: int, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
        """(the token's logprob, the likeliest ones)"""
        chosen = -(1 + digest % _VARIANTS) / _VARIANTS
        return chosen, [((token + rank) % self._vocab_size, chosen - rank) for rank in range(count)]
