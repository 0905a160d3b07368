"""The one place where the parts of this package are put together."""

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial

from fastapi import FastAPI

from kvcore import metric_names as names
from kvcore.config.schema import ClusterConfig
from kvcore.process.service import Lifecycle
from kvcore.telemetry import Metrics, log_fields
from metadata_server.cache_messages import KindSwitch
from metadata_server.client import MetadataClient
from nodeapi.client import HttpNodeClient
from router.admission.sharing import SharedAdmission
from router.requests.services import RequestServices
from router.shadow.comparing import ShadowComparisons
from router.shadow.gate import BlendGate
from router.shadow.keeping import KeptSwitches
from router.shadow.quarantine import ChunkQuarantine
from router.shadow.routes import BlendRoutes, add_no_blend
from router.status import StatusView
from router.upkeep.limits import UpkeepLimits
from router.upkeep.nodes import KeepingNodes

_log = logging.getLogger("router")


def open_shadow(
    config: ClusterConfig,
    services: RequestServices,
    lifecycle: Lifecycle,
    *,
    metadata: MetadataClient | None,
    status: StatusView,
    metrics: Metrics,
    shared: SharedAdmission | None,
) -> Callable[[FastAPI], None]:
    """Compares from now on. Returns what adds the routes. `shared`: by what the other routers are told; None:
    there are none."""
    cluster, client, clock, gate = services.cluster, services.client, services.clock, services.gate
    if metadata is None or not isinstance(client, HttpNodeClient):
        return add_no_blend
    quarantine = ChunkQuarantine(metadata, KeepingNodes(cluster, client, UpkeepLimits()))
    shadow = ShadowComparisons(
        cluster,
        client,
        clock,
        gate,
        quarantine.drop,
        model=config.model.name,
        shares=(config.kv.shadow, config.kv.blend.shadow if config.kv.blend.mode != "off" else 0.0),
        draw=random.Random().random,
    )
    services.log.prompt_observers.append(shadow.ended)
    lifecycle.describe.append(lambda: [repr(shadow), repr(gate)])
    lifecycle.tasks.create_task(shadow.run(), name="shadow comparisons")
    status.problems_beside += [gate.problem, shadow.problem]
    show(gate, shadow, metrics)
    told = partial(follow, gate)
    if gate.mode != "off":
        lifecycle.tasks.create_task(KeptSwitches(gate, metadata, told).run(), name="kept switches of documents")
    if shared is not None:
        share(gate, shared, told)
    return BlendRoutes(gate, shadow, int(config.router.max_body)).add_to


def show(gate: BlendGate, shadow: ShadowComparisons, metrics: Metrics) -> None:
    """In the router's metrics."""
    metrics.sampled(names.ROUTER_SHADOW, lambda: list(shadow.counts.items()))
    metrics.sampled(names.ROUTER_WRONG_CHUNKS, lambda: [((), shadow.wrong_chunks)])
    metrics.sampled(names.ROUTER_BLEND_OFF, lambda: _off(gate))


def _off(gate: BlendGate) -> list[tuple[tuple[str, ...], float]]:
    return [((one.model, one.kind), float(bool(one.off))) for one in gate.report().kinds]


def follow(gate: BlendGate, switches: Sequence[KindSwitch]) -> None:
    """Others say this: do so, and say what has changed by it."""
    for one in gate.told(switches):
        level, event = (logging.ERROR, "blend_off") if one.off else (logging.WARNING, "blend_on")
        log_fields(_log, level, event, model=one.model, kind=one.kind, told=True, why=one.off or None)


def share(gate: BlendGate, shared: SharedAdmission, told: Callable[[Sequence[KindSwitch]], None]) -> None:
    """Tell the other routers and processes what was turned, and be `told`."""
    shared.switches, shared.told_switches = gate.switches, told
    gate.on_change.append(shared.tell_all)
