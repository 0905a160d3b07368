"""What becomes of LMCache's settings: the part of our cluster file, and a note for each key. Values only."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvcore.types import Role
from kvferry.serve_plan import DECODER, PREFILLER, USUAL_PORTS

Tree = dict[str, object]


class Fate(StrEnum):
    """What became of a key."""

    MAPPED = "mapped"
    """It says something in our file."""
    IGNORED = "ignored"
    """Nothing is lost: it is so here anyway, or means nothing here."""
    REFUSED = "refused"
    """What it asks for is not there, or it cannot be read."""


@dataclass(frozen=True, slots=True)
class KeyNote:
    """One for each key that was given."""

    key: str
    fate: Fate
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.fate}: {self.text}"


@dataclass(slots=True)
class Draft:
    """A part of a cluster file while it is put together from `settings`, and afterwards."""

    settings: Mapping[str, object]
    """By LMCache's keys, in small letters; those of `extra_config` as `extra_config.KEY`."""
    part: Tree = field(default_factory=dict)
    """All but `nodes`."""
    node: Tree = field(default_factory=dict)
    """What each node has."""
    disks: list[Tree] = field(default_factory=list)
    """A disk tier for each of several paths: node by node in turn."""
    role: Role | None = None
    """None: both."""
    notes: list[KeyNote] = field(default_factory=list)

    def put(self, path: str, value: object) -> None:
        """Set `a.b.c` of the part."""
        *sections, last = path.split(".")
        place = self.part
        for name in sections:
            section = place.setdefault(name, {})
            assert isinstance(section, dict)
            place = section
        place[last] = value

    def refused(self) -> list[KeyNote]:
        """The notes of keys that were refused."""
        return [note for note in self.notes if note.fate is Fate.REFUSED]

    def whole(self) -> Tree:
        """The part with the nodes that it speaks of."""
        roles = {PREFILLER: (Role.PREFILLER, USUAL_PORTS[0]), DECODER: (Role.DECODER, USUAL_PORTS[1])}
        names = [name for name, (role, _) in roles.items() if self.role in (None, role)]
        own = self.of_nodes(names)
        if self.role is None and not any(own.values()):
            return self.part
        nodes = {name: {"role": roles[name][0].value, "port": roles[name][1], **own[name]} for name in names}
        return {**self.part, "nodes": nodes}

    def of_nodes(self, names: Sequence[str]) -> dict[str, Tree]:
        """What each of these nodes has beside the cluster's sections."""
        disks = self.disks if len(self.disks) > 1 else []
        return {
            name: {**self.node, **({"disk": disks[number % len(disks)]} if disks else {})}
            for number, name in enumerate(names)
        }

    def overrides(self, names: Sequence[str], without: Sequence[str]) -> list[str]:
        """`path=value` as `--set` takes them, for a cluster with these nodes; without the keys of nodes and tiers that
        the command line gives (`segment`, `disk`, `redis`)."""
        nodes: Tree = {name: dict(own) for name, own in self.of_nodes(names).items()}
        return [
            f"{path}={json.dumps(value, ensure_ascii=False)}"
            for path, value in _leaves({**self.part, "nodes": nodes}, "")
            if not any(word in without for word in path.split("."))
        ]


def _leaves(tree: Tree, path: str) -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, here)
        else:
            yield here, value
