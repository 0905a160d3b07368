"""Plans of a rollout: two files and what runs -> what is to be done, and what cannot be."""

from typing import Any

import msgspec
import pytest

from kvcore.config.live.settings import (
    all_settings,
    changes_between,
    metadata_settings,
    node_settings,
    router_settings,
    settings_name,
)
from kvcore.config.schema import ClusterConfig, MetadataServerConfig, ModelConfig, NodeConfig, RouterConfig
from kvcore.config.schema import SimEngineConfig as Sim
from kvcore.config.security import ClusterTlsConfig, SecurityConfig
from kvcore.config.tiers import TiersConfig
from kvcore.types import Role
from kvferry.launch.processes import ProcessKind
from kvferry.rollout.plan import ProcessSeen, RolloutPlan, plan_rollout

with_ = msgspec.structs.replace
NAMES = {"p0": Role.PREFILLER, "p1": Role.PREFILLER, "d0": Role.DECODER, "d1": Role.DECODER}
OLD = ClusterConfig(
    cluster="c",
    model=ModelConfig(path="sim", name="sim"),
    engine=Sim(),
    nodes={name: NodeConfig(role=role, port=port) for port, (name, role) in enumerate(NAMES.items(), start=1)},
)
NEW = with_(OLD, engine=Sim(max_sequences=8))


def seen(config: ClusterConfig | None = OLD, **differs: dict[str, Any]) -> list[ProcessSeen]:
    """All processes as they run by `config`; `differs`: fields of some."""
    servers = {"metadata-server": ProcessKind.METADATA_SERVER, "router": ProcessKind.ROUTER}
    rows = [{"name": name, "kind": kind, "config": config} for name, kind in servers.items()]
    rows += [{"name": name, "kind": ProcessKind.NODE, "config": config, "role": role} for name, role in NAMES.items()]
    return [ProcessSeen(**{**row, **differs.get(str(row["name"]), {})}) for row in rows]


def names(plan: RolloutPlan) -> list[list[str]]:
    return [[step.name for step in batch] for batch in plan.batches]


def test_only_those_are_rolled_that_go_by_what_changes_prefillers_and_decoders_by_turns():
    plan = plan_rollout(OLD, NEW, seen())
    assert names(plan) == [["p0"], ["d0"], ["p1"], ["d1"]] and not plan.refused and not plan.notes
    assert {step.changes for step in plan.steps} == {("engine.max_sequences: 64 -> 8",)}
    own = with_(OLD, nodes=OLD.nodes | {"d1": with_(OLD.nodes["d1"], segment=1 << 20)})
    assert names(plan_rollout(OLD, own, seen())) == [["d1"]]
    router = with_(OLD, router=RouterConfig(max_waiting=5), metadata_server=MetadataServerConfig(event_log=100))
    assert names(plan_rollout(OLD, router, seen())) == [["metadata-server"], ["router"]]
    everything = with_(OLD, service=with_(OLD.service, log_level="debug"))
    assert names(plan_rollout(OLD, everything, seen(), at_once=3)) == [
        ["metadata-server"], ["router"], ["p0", "d0", "p1"], ["d1"],
    ]  # fmt: skip
    assert names(plan_rollout(OLD, OLD, seen())) == []


def test_some_at_a_time_are_never_all_that_can_take_requests():
    assert names(plan_rollout(OLD, NEW, seen(), at_once=4)) == [["p0", "d0", "p1"], ["d1"]]
    two = seen(OLD, p0={"serves": False}, d0={"serves": False})
    assert names(plan_rollout(OLD, NEW, two, at_once=2)) == [["p0", "d0"], ["p1"], ["d1"]]


def test_a_rollout_that_was_cut_off_goes_on_where_it_is():
    running = seen(OLD, p0={"config": NEW}, d0={"config": NEW, "drained": True}, p1={"serves": False, "drained": True})
    plan = plan_rollout(OLD, NEW, running, own_drains=frozenset({"d0", "p1"}))
    assert names(plan) == [["p1"], ["d0"], ["d1"]]
    tried = next(step for step in plan.steps if step.name == "d0")
    assert not tried.restart and tried.resume  # it goes by the file: only to be tried out and used again
    failed = seen(NEW, d0={"drained": True, "serves": False})
    (step,) = plan_rollout(OLD, NEW, failed, own_drains=frozenset({"d0"})).steps
    assert step.restart and step.changes == ("it does not serve",)


def test_a_node_that_somebody_else_has_drained_stays_drained():
    plan = plan_rollout(OLD, NEW, seen(OLD, d0={"drained": True}))
    assert {step.name: step.resume for step in plan.steps} == {"p0": True, "d0": False, "p1": True, "d1": True}
    assert names(plan_rollout(OLD, OLD, seen(OLD, d0={"drained": True}))) == []


def test_the_last_node_that_can_take_requests_is_not_drained():
    away = {name: {"drained": True} for name in ("p0", "p1", "d1")}
    plan = plan_rollout(OLD, NEW, seen(OLD, **away))
    assert {step.name: step.drain for step in plan.steps} == {"p0": True, "d0": False, "p1": True, "d1": True}


def test_nodes_say_what_they_go_by_where_no_launcher_knows():
    new, old = settings_name(node_settings(NEW, "p0")), settings_name(node_settings(OLD, "p1"))
    plan = plan_rollout(
        OLD, NEW, seen(None, p0={"settings": new}, p1={"settings": old}, d0={"settings": "other"}, d1={})
    )
    assert {step.name: step.changes for step in plan.steps} == {
        "p1": ("engine.max_sequences: 64 -> 8",),
        "d0": ("it goes by neither file",),
        "d1": ("engine.max_sequences: 64 -> 8",),
    }


def test_what_a_node_has_reloaded_is_not_started_anew_and_a_password_that_is_told_to_nobody_is():
    louder = with_(OLD, service=with_(OLD.service, log_level="debug"))
    told = {name: {"settings": settings_name(node_settings(louder, name))} for name in NAMES}
    assert names(plan_rollout(OLD, louder, seen(OLD, **told))) == [["metadata-server"], ["router"]]
    before, after = (
        with_(OLD, tiers=msgspec.convert({"redis": {"url": f"redis://:{word}@h:1"}}, TiersConfig)) for word in "ab"
    )
    told = {name: {"settings": settings_name(node_settings(after, name))} for name in NAMES}
    (first, *_) = plan_rollout(before, after, seen(before, **told)).steps
    assert first.changes == ('tiers.redis.url: "redis://h:1" -> "redis://h:1"',)


def test_another_version_of_kvferry_or_a_wish_starts_what_has_not_changed():
    plan = plan_rollout(OLD, OLD, seen(OLD, d0={"release": "1.0"}, d1={"release": "2.0"}), release="2.0")
    assert [(step.name, step.changes) for step in plan.steps] == [("d0", ("kvferry 1.0 -> 2.0",))]
    assert names(plan_rollout(OLD, OLD, seen(), again=frozenset({"router", "d1"}))) == [["router"], ["d1"]]


def test_other_weights_are_kept_apart_and_that_is_said():
    plan = plan_rollout(OLD, with_(OLD, model=with_(OLD.model, version="v2")), seen())
    assert "share no KV" in plan.notes[0] and names(plan)[0] == ["router"] and len(plan.steps) == 5


@pytest.mark.parametrize(
    ("new", "named"),
    [
        (with_(OLD, cluster="other"), ["cluster: "]),
        (with_(OLD, model=with_(OLD.model, name="b")), ["model.name: "]),
        (with_(OLD, metadata_server=MetadataServerConfig(port=1)), ["metadata_server.port: "]),
        (with_(OLD, router=RouterConfig(port=1, admin_port=2)), ["router.admin_port: ", "router.port: "]),
        (with_(OLD, routers=["127.0.0.1:99"]), ["routers: "]),
        (
            with_(OLD, security=SecurityConfig(tls=ClusterTlsConfig(cert="a", key="b", ca="c"))),
            ["security.tls: "],
        ),
        (with_(OLD, nodes={**OLD.nodes, "d2": OLD.nodes["d1"]}), ["nodes.d2: it is new"]),
        (with_(OLD, nodes={"d0": OLD.nodes["d0"], "d1": OLD.nodes["d1"]}), ["nodes.p0: ", "nodes.p1: "]),
        (with_(OLD, nodes=OLD.nodes | {"d0": with_(OLD.nodes["d0"], port=77)}), ["nodes.d0.port: "]),
        (with_(OLD, nodes=OLD.nodes | {"d0": with_(OLD.nodes["d0"], role=Role.PREFILLER)}), ["nodes.d0.role: "]),
    ],
)
def test_what_cannot_be_rolled_is_refused_by_name(new: ClusterConfig, named: list[str]):
    plan = plan_rollout(OLD, with_(new, engine=Sim(max_sequences=8)), seen())
    assert not plan.steps and len(plan.refused) == len(named)
    assert all(line.startswith(start) for line, start in zip(plan.refused, named, strict=True))


def test_a_role_that_a_node_has_taken_by_order_may_be_written_into_the_file():
    new = with_(OLD, nodes=OLD.nodes | {"d0": with_(OLD.nodes["d0"], role=Role.PREFILLER)})
    (refused,) = plan_rollout(OLD, new, seen()).refused
    assert refused == "nodes.d0.role: `kvferry role d0 prefiller` first, it is a decoder"
    assert names(plan_rollout(OLD, new, seen(OLD, d0={"role": Role.PREFILLER}))) == [["router"]]


def test_settings_are_told_by_a_name_without_passwords_and_without_the_role():
    before = with_(OLD, tiers=msgspec.convert({"redis": {"url": "redis://:secret@h:1"}}, TiersConfig))
    after = with_(OLD, tiers=msgspec.convert({"redis": {"url": "redis://:other@h:1"}}, TiersConfig))
    assert settings_name(node_settings(before, "p0")) == settings_name(node_settings(after, "p0"))
    (change,) = changes_between(all_settings(before), all_settings(after))
    assert "secret" not in str(change) and change.path.endswith("url")
    switched = with_(OLD, nodes=OLD.nodes | {"p0": with_(OLD.nodes["p0"], role=Role.DECODER)})
    assert node_settings(switched, "p0") == node_settings(OLD, "p0")
    assert router_settings(switched) != router_settings(OLD) and metadata_settings(switched) == metadata_settings(OLD)
    assert settings_name(node_settings(NEW, "p0")) != settings_name(node_settings(OLD, "p0"))
