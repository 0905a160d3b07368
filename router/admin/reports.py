"""What the router's `/v1/nodes` calls take and answer; `kvferry nodes` reads this same shape.

Readers ignore fields that they do not know; a field that is added has a default.
"""

from typing import Annotated

import msgspec


class NodeRow(msgspec.Struct, kw_only=True):
    """One node. None: not known here."""

    id: str
    role: str = ""
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


class NodesReport(msgspec.Struct, kw_only=True):
    """Answer of `GET /v1/nodes`. `problems`: what could not be asked."""

    nodes: list[NodeRow]
    problems: list[str] = []


class NodeOrderBody(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/nodes/{drain,undrain,remove}`."""

    node: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    move: bool = False
    """`drain`: its chunks are copied to other nodes, too, as far as there is free room."""
    force: bool = False
    """`remove`: also a node that is alive."""


class NodeOrdered(msgspec.Struct, kw_only=True):
    """Its answer. `node` None: it is forgotten. `note`: what follows from it that may not be wanted."""

    node: NodeRow | None = None
    note: str = ""
