"""The `kv` of a cluster file: how KV is cut, checked and kept secret, and what is reused of it. Values only."""

from typing import Annotated, Literal

import msgspec

from kvcore.config.fields import Count, Section

BlendMode = Literal["off", "first_k"]


class BlendConfig(Section, frozen=True, kw_only=True):
    """Reuse of documents wherever they stand in a prompt. It changes answers: it is lossy, but for a document right
    behind the header."""

    mode: BlendMode = "off"
    """`first_k`: the KV of a document that is known is turned to where it stands, and the first `k` tokens are computed
    anew. `off`: documents are computed as all other text is."""
    k: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 8
    """Tokens at a document's beginning that are computed anew."""
    separator: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None
    """What stands between two of them in one text is a document, as with `" # # "`, which other caches have. Documents
    that are named in other ways need none."""
    max_kl: Annotated[float, msgspec.Meta(gt=0)] = 0.3
    """Mean divergence, in nats, of the first token's distribution from that of the full computation, above which the
    mode goes off by itself."""
    min_agreement: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.8
    """Share of tokens that are the likeliest both ways, below which it does so too."""
    shadow: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.005
    """Share of such requests that are computed both ways while a node is idle, and compared. 0: none, so nothing
    watches what the mode costs."""


class KVConfig(Section, frozen=True, kw_only=True):
    """How KV is cut and checked."""

    chunk_tokens: Count = 256
    """Tokens of one chunk: what is stored, found and moved at once. All nodes of a cluster have the same."""
    verify: bool | Literal["checksum", "mac"] = True
    """What is checked of a chunk that is read, beside its header. `checksum`: whether it is damaged. `mac`: whether it
    was written with the cluster's secret. `true`: `mac` if there is one, else `checksum`. `false`: nothing."""
    encrypt: bool = False
    """Whether KV is encrypted wherever engines share it: in segments, on its way between nodes by any transport, and in
    tiers. It needs the cluster's secret. All nodes of a cluster have the same; what was stored before is not found."""
    shadow: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Share of the requests answered from the cache that are computed in full too while their node is idle, and
    compared token by token. Chunks that are wrong are named in the log and dropped everywhere. 0: none."""
    blend: BlendConfig = BlendConfig()
    """Whether documents in prompts are reused wherever they stand, and what that may cost."""
