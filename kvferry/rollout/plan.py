"""What is to be done for a running cluster to go by another file: which process, why, in which order. Pure.

Metadata servers come first, as an older one may lock out a newer node, then routers, then nodes: those that do not
serve anyway before the others, and prefillers and decoders by turns, so that each fingerprint soon has both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from kvcore.config.live.settings import (
    Settings,
    all_settings,
    changes_between,
    metadata_settings,
    node_settings,
    router_settings,
    settings_name,
)
from kvcore.config.schema import ClusterConfig
from kvcore.types import Role
from kvferry.launch.processes import ProcessKind

_FIXED = {
    "cluster": "it is another cluster then: bring that one up beside this one, and move the clients",
    "handoff": "nodes of one handoff do not understand those of another: bring a second cluster up beside this one",
    "model.name": "a router serves one model name: bring a second cluster up beside this one",
    "metadata_server.host": "every process finds it there: stop the cluster for it",
    "metadata_server.port": "every process finds it there: stop the cluster for it",
    "metadata_server.standbys": "every process finds it there: stop the cluster for it",
    "metadata_server.partitions": "the index is divided by it: docs/metadata.md says how it is changed",
    "metadata_server.records": "what must survive is there: docs/metadata.md says how it is changed",
    "router.host": "clients find it there: stop the cluster for it",
    "router.port": "clients find it there: stop the cluster for it",
    "router.admin_host": "commands find it there: stop the cluster for it",
    "router.admin_port": "commands find it there: stop the cluster for it",
    "router.processes": "each is a process of its own: stop the cluster for it",
    "router.process_port": "its processes find each other there: stop the cluster for it",
    "routers": "clients find them there: start or stop the one by its own command",
}
_RELOADED = ("service.log_level",)
"""What a node may have taken over since it was started."""
_MOVED = ("host", "port", "url", "bootstrap_port")


@dataclass(frozen=True, slots=True)
class ProcessSeen:
    """A process as it runs. `config`: what it was started with; None: nobody here knows. The rest is of nodes alone:
    `settings` and `release` as it reports them, `drained` by order, `serves`: it would be used but for that."""

    name: str
    kind: ProcessKind
    config: ClusterConfig | None = None
    settings: str = ""
    release: str = ""
    role: Role | None = None
    drained: bool = False
    serves: bool = True


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """One process. `restart` false: it goes by the file already, and is to be tried out and used again. `drain` false:
    no other node could take its requests, which wait until it is back."""

    name: str
    kind: ProcessKind
    changes: tuple[str, ...]
    restart: bool = True
    drain: bool = True
    resume: bool = True
    """It is used again afterwards: nobody but the rollout has drained it."""


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """`refused`: what stands against all of it, a sentence each. `batches`: each is over before the next begins."""

    refused: tuple[str, ...] = ()
    batches: tuple[tuple[RolloutStep, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> list[RolloutStep]:
        """In their order."""
        return [step for batch in self.batches for step in batch]


def plan_rollout(
    old: ClusterConfig,
    new: ClusterConfig,
    seen: Sequence[ProcessSeen],
    *,
    at_once: int = 1,
    release: str = "",
    own_drains: frozenset[str] = frozenset(),
    again: frozenset[str] = frozenset(),
) -> RolloutPlan:
    """From `old`, where a process is not known to go by something else, to `new`. `release`: of kvferry, that all shall
    run. `own_drains`: nodes that an earlier run of this rollout has drained. `again`: processes to be started anew
    though nothing of them changes."""
    refused = tuple(_refusals(old, new, {one.name: one.role for one in seen}))
    if refused:
        return RolloutPlan(refused)
    wish = _Wish(old, new, release, own_drains, again)
    steps = {one.name: step for one in seen if (step := wish.step(one)) is not None}
    by_kind = {kind: [one for one in seen if one.kind is kind and one.name in steps] for kind in ProcessKind}
    nodes = by_kind[ProcessKind.NODE]
    engines = [one for one in seen if one.kind is ProcessKind.NODE and one.role is not Role.STORE]
    usable = {one.name for one in engines if one.serves and (not one.drained or one.name in own_drains)}
    ordered = [
        steps[one.name] if usable - {one.name} or one.role is Role.STORE else _undrained(steps[one.name])
        for one in _by_turns(nodes)
    ]
    singly = [(steps[one.name],) for kind in (ProcessKind.METADATA_SERVER, ProcessKind.ROUTER) for one in by_kind[kind]]
    batches = _batches(ordered, at_once, usable)
    return RolloutPlan((), (*singly, *batches), tuple(_notes(steps.values())))


def process_settings(config: ClusterConfig, name: str, kind: ProcessKind) -> Settings:
    """What this process goes by."""
    if kind is ProcessKind.NODE:
        return node_settings(config, name)
    return router_settings(config) if kind is ProcessKind.ROUTER else metadata_settings(config)


@dataclass(frozen=True, slots=True)
class _Wish:
    """As of `plan_rollout`."""

    old: ClusterConfig
    new: ClusterConfig
    release: str
    own_drains: frozenset[str]
    again: frozenset[str]

    def step(self, seen: ProcessSeen) -> RolloutStep | None:
        """None: it goes by the new file, and nothing of it is left to do."""
        changes, own = self._changes(seen), seen.name in self.own_drains
        if own and not seen.serves and not changes:
            changes = ["it does not serve"]
        if changes:
            return RolloutStep(seen.name, seen.kind, tuple(changes), resume=own or not seen.drained)
        if own and seen.drained:
            return RolloutStep(seen.name, seen.kind, ("it goes by the file, and is drained still",), restart=False)
        return None

    def _changes(self, seen: ProcessSeen) -> list[str]:
        wanted = process_settings(self.new, seen.name, seen.kind)
        before = process_settings(seen.config or self.old, seen.name, seen.kind)
        told = bool(seen.settings) and seen.settings == settings_name(wanted)
        changes = [str(one) for one in changes_between(before, wanted) if not (told and one.path in _RELOADED)]
        if told and seen.config is None:
            changes = []
        elif seen.settings and seen.config is None and seen.settings != settings_name(before):
            changes = ["it goes by neither file"]
        elif seen.settings and not changes and seen.settings != settings_name(wanted):
            changes = ["it goes by other settings than it was started with"]
        if self.release and seen.release and seen.release != self.release:
            changes.append(f"kvferry {seen.release} -> {self.release}")
        if seen.name in self.again:
            changes.append("started anew")
        return changes


def _undrained(step: RolloutStep) -> RolloutStep:
    return RolloutStep(step.name, step.kind, step.changes, step.restart, drain=False, resume=step.resume)


def _batches(steps: Iterable[RolloutStep], at_once: int, usable: set[str]) -> list[tuple[RolloutStep, ...]]:
    """Of `at_once` at most, and never all that can take requests."""
    batches: list[list[RolloutStep]] = []
    for step in steps:
        last = batches[-1] if batches else []
        if batches and len(last) < at_once and usable - {one.name for one in last} - {step.name}:
            last.append(step)
        else:
            batches.append([step])
    return [tuple(batch) for batch in batches]


def _by_turns(nodes: Iterable[ProcessSeen]) -> list[ProcessSeen]:
    nodes = list(nodes)
    away = [one for one in nodes if not one.serves]
    rows = [[one for one in nodes if one.serves and one.role is role] for role in Role]
    return [*away, *(one for row in zip_longest(*rows) for one in row if one is not None)]


def _refusals(old: ClusterConfig, new: ClusterConfig, roles: Mapping[str, Role | None]) -> list[str]:
    before, after = all_settings(old), all_settings(new)
    said = [f"{path}: {why}" for path, why in _FIXED.items() if _below(before, path) != _below(after, path)]
    if not new.handoff.traits.has_store:
        said.append("handoff: vLLM servers that run by themselves are restarted by what started them")
    was_secured, is_secured = old.security, new.security
    if (was_secured.tls is None) != (is_secured.tls is None):
        said.append("security.tls: processes with it and without do not understand each other")
    if (was_secured.secret is None) != (is_secured.secret is None):
        said.append("security.secret: processes with it and without do not understand each other")
    said += [f"nodes.{name}: it is new: start it by its own command, it joins" for name in new.nodes.keys() - old.nodes]
    gone = old.nodes.keys() - new.nodes
    said += [f"nodes.{name}: it is no more: `kvferry drain {name}`, stop it, `kvferry nodes remove`" for name in gone]
    for name in sorted(old.nodes.keys() & new.nodes):
        was, becomes = old.nodes[name], new.nodes[name]
        for what in _MOVED:
            if getattr(was, what) != getattr(becomes, what):
                said.append(f"nodes.{name}.{what}: the others find it there: a node that moves takes another name")
        if was.role is not becomes.role and roles.get(name) is not becomes.role:
            said.append(f"nodes.{name}.role: `kvferry role {name} {becomes.role}` first, it is a {was.role}")
    return sorted(said)


def _notes(steps: Iterable[RolloutStep]) -> list[str]:
    kinds = ("model.path", "model.dtype", "model.version", "kv.chunk_tokens", "engine.weights_version")
    other = any(text.startswith(kinds) for step in steps if step.kind is ProcessKind.NODE for text in step.changes)
    return (
        [
            "nodes before and after share no KV: each request stays with one kind, and a stream that has begun goes on "
            "there alone"
        ]
        if other
        else []
    )


def _below(settings: Mapping[str, object], path: str) -> dict[str, object]:
    return {one: value for one, value in settings.items() if one == path or one.startswith(f"{path}.")}
