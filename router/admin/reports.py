"""What the router's `/v1/nodes` and `/v1/janitor` calls take and answer; `kvferry` reads this same shape.

Readers ignore fields that they do not know; a field that is added has a default.
"""

from typing import Annotated

import msgspec

from metadata_server.account_messages import OrphanKind, OrphansOfKind
from metadata_server.cache_messages import OrderedRole


class NodeRow(msgspec.Struct, kw_only=True):
    """One node. None: not known here."""

    id: str
    role: str = ""
    ordered_role: str = ""
    """As what it was last told to serve, which it may not have heard of yet; empty: as its file says."""
    state: str
    """`ready`, `starting`, `registering`, `draining`, `drained`, `lost` or `refused`."""
    why: str = ""
    """Why it is not `ready`; empty where the state says it all."""
    since: float | None = None
    """When it came into this state, Unix seconds; where nobody ordered it, as this router saw it."""
    used_bytes: int | None = None
    """Of its segments."""
    size_bytes: int = 0
    requests: int | None = None
    """Under way, of all routers."""
    release: str = ""
    """The version of kvferry that it runs."""
    weights: str = ""
    """`model.version`, as its engine has it."""
    url: str = ""
    incarnation: int = 0
    """Of the start that is running, as it last said; 0: it has said nothing."""
    settings: str = ""
    """The name of what its process goes by. Empty: it is older than that."""
    serves: bool = False
    """It would be used if it were not drained: its engine is there, and the metadata server knows this start of it."""


class NodesReport(msgspec.Struct, kw_only=True):
    """Answer of `GET /v1/nodes`. `problems`: what could not be asked."""

    nodes: list[NodeRow]
    problems: list[str] = []


class NodeOrderBody(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/nodes/{drain,undrain,remove,role}`."""

    node: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    move: bool = False
    """`drain`: its chunks are copied to other nodes, too, as far as there is free room."""
    force: bool = False
    """`remove`: also a node that is alive."""
    role: OrderedRole | msgspec.UnsetType = msgspec.UNSET
    """`role`: as what it is to serve from now on."""


class NodeTrialBody(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/nodes/try`: have a node make one token, drained or not."""

    node: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 30.0


class NodeTried(msgspec.Struct, kw_only=True):
    """Its answer. `problem`: why it made none; empty: it has."""

    problem: str = ""


class NodeOrdered(msgspec.Struct, kw_only=True):
    """Its answer. `node` None: it is forgotten. `note`: what follows from it that may not be wanted."""

    node: NodeRow | None = None
    note: str = ""


class JanitorReport(msgspec.Struct, kw_only=True):
    """Answer of `GET /v1/janitor`: kinds of which there are some, and generations of KV in tiers that nobody uses.
    `problems`: why something cannot be told."""

    kinds: list[OrphansOfKind]
    stale_generations: list[str] = []
    problems: list[str] = []


class JanitorOrder(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/janitor`: remove those of a kind that were listed with the same `older_s`."""

    kind: OrphanKind
    ids: Annotated[list[str], msgspec.Meta(max_length=65_536)]
    older_s: Annotated[float, msgspec.Meta(ge=0, le=31_622_400)]


class JanitorRemoved(msgspec.Struct, kw_only=True):
    """Its answer. What is not among `removed` is owned again or was gone already; with `problems` it was left alone."""

    removed: list[str]
    problems: list[str] = []
