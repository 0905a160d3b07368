"""What the router's `/v1/blend` calls take and answer; `kvferry blend` reads this same shape."""

import msgspec


class KindReport(msgspec.Struct, kw_only=True):
    """Documents of one kind, of one model. `off`: why they are not reused; empty: they are. `since`: when that last
    changed, Unix seconds; 0: never. `kl` (nats, of the first token) and `agreement`: means over the last
    `window` comparisons; None: there are none."""

    model: str
    kind: str
    off: str = ""
    since: float = 0.0
    compared: int = 0
    window: int = 0
    kl: float | None = None
    agreement: float | None = None


class DivergentChunk(msgspec.Struct, kw_only=True):
    """A chunk whose reused KV was not what its tokens give. `key`: hex. `number`: in its prompt, from 0 on."""

    key: str
    number: int
    distance: float
    """As in `nodeapi.documents.CompareReply`."""


class ReuseDivergence(msgspec.Struct, kw_only=True):
    """A request whose exact reuse was wrong. `sources`: by what way the node had got its chunks, as its record says.
    `replicas`: nodes in whose segments copies were found and dropped. `left`: what could not be removed, and why."""

    request_id: str
    node: str
    at: float
    gap: float
    """How much less likely the worst token was than the full computation's own, nats; 1e9 at most, as `distance`."""
    chunks: list[DivergentChunk] = []
    sources: list[str] = []
    replicas: list[str] = []
    left: list[str] = []


class BlendReport(msgspec.Struct, kw_only=True):
    """The body of GET /v1/blend. The settings are the cluster file's (`kv.blend`, `kv.shadow`)."""

    mode: str
    k: int = 0
    max_kl: float = 0.0
    min_agreement: float = 0.0
    shadow: float = 0.0
    kinds: list[KindReport] = []
    exact_shadow: float = 0.0
    comparisons: dict[str, int] = {}
    """Of requests that were to be compared since the router's start: `WHAT OUTCOME` -> how many."""
    waiting: int = 0
    divergences: list[ReuseDivergence] = []
    """The last ones of exact reuse, the latest first."""


class BlendOrder(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/blend/on: documents are reused again. `kinds`: those; None: all."""

    kinds: list[str] | None = None


class BlendTurned(msgspec.Struct, kw_only=True):
    """What that has turned on, in words; all else was on."""

    kinds: list[str]
