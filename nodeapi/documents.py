"""Documents in a prompt, which are reused wherever they stand, and the comparison that says what reuse costs.

The rules of `nodeapi.messages` hold: requests are strict, replies tolerant. Nodes know all of this since DOCUMENTS;
older ones refuse requests with documents, and answer 404 to a comparison.
"""

import msgspec

DOCUMENTS = 3
"""The version of the nodes' API since which requests may have documents."""
MAX_DOCUMENTS = 1024
"""Of one request."""
UNKNOWN = "it is of a version that knows no documents"


class Documents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the documents of a prompt stand, by token: `[start, end)` of each, in order, apart from each other.

    `header`: that many leading tokens are what each document was, or will be, computed behind, whatever else the prompt
    has between them. The first `k` tokens of each are computed anew where they stand, but for a document that begins
    where the header ends: that one is exact."""

    header: int
    spans: list[tuple[int, int]]
    k: int = 8

    def problem(self, num_tokens: int) -> str | None:
        """What is wrong with it for a prompt of so many tokens, or None."""
        if not 0 <= self.header <= num_tokens:
            return f"header: {self.header} does not lie in 0..{num_tokens}"
        if self.k < 0:
            return "k: must not be negative"
        end = self.header
        for at, (start, stop) in enumerate(self.spans):
            if not end <= start < stop <= num_tokens:
                return f"spans[{at}]: [{start}, {stop}) is empty, overlaps what is before it, or leaves the prompt"
            end = stop
        return None if self.spans else "spans: there are none"


class CompareRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of `POST /v1/compare`: run this prompt in full, reusing nothing, and as a request would run that reuses what
    it may, then say how far the second is from the first. Greedy, over `num_tokens` tokens. Answered by an engine that
    has nothing else to do, else refused as overloaded; what comes meanwhile goes first.

    `documents`: None compares what is reused exactly."""

    request_id: str
    prompt_token_ids: list[int]
    cache_salt: bytes = b""
    documents: Documents | None = None
    num_tokens: int = 12
    max_distance: float = 0.0
    """Chunks whose `CompareReply.distances` is beyond this are found no more in the engine's own memory. 0: none are
    dropped. What the store has of them is not touched."""
    deadline_s: float


class CompareReply(msgspec.Struct, frozen=True, kw_only=True):
    """One entry a token in `token_ids`, `kl` and `gaps`. Both ways are led along the full one's tokens, so one
    difference does not make others. The full one stops at an end-of-sequence token."""

    request_id: str
    token_ids: list[int]
    """The likeliest tokens, computed in full."""
    kl: list[float]
    """Divergence of the reusing way's distribution from the full one's, nats, over the whole vocabulary."""
    gaps: list[float]
    """How much less likely (nats, by the full distribution) the token is that the reusing way would have picked. 0: it
    picks the same. Near 0: a tie."""
    cached_tokens: int = 0
    """Of the prompt, reused exactly ..."""
    approximate_tokens: int = 0
    """... reused approximately ..."""
    computed_tokens: int = 0
    """... and computed, by the reusing way."""
    distances: list[float] = []
    """One for each full chunk that was reused by its prefix, in order: the largest difference of K, or of V, from the
    full computation's, in units of the largest number there. Rounding makes about 1e-6 with float32, 1e-2 with
    bfloat16. Empty where the engine has no room for both."""
    full_s: float = 0.0
    """From its beginning to its first token, computed in full ..."""
    reused_s: float = 0.0
    """... and reused, without the time that documents took to be found or computed apart."""

    @property
    def agreement(self) -> float:
        """Share of tokens that both ways pick."""
        return sum(gap == 0 for gap in self.gaps) / len(self.gaps) if self.gaps else 1.0
