"""What every request of a router is given."""

from dataclasses import dataclass, field

from kvcore.clock import Clock
from kvcore.config.kv.settings import BlendConfig
from kvcore.config.schema import ClusterConfig, RouterConfig
from kvcore.handoff import HandoffKind
from nodeapi.protocol import NodeClient
from router.nodes.cluster import Cluster
from router.requests.control import ControlCalls
from router.requests.flow.timers import RequestTimers
from router.requests.limits import RequestLimits
from router.requests.records import RequestLog
from router.shadow.gate import BlendGate


@dataclass(slots=True, eq=False)
class RequestServices:
    """Shared by all requests; a request changes no field of it. `config` is another one once the file was read again:
    ask it when it is needed."""

    config: RouterConfig
    cluster: Cluster
    client: NodeClient
    clock: Clock
    log: RequestLog
    handoff: HandoffKind = HandoffKind.KVFERRY
    limits: RequestLimits = RequestLimits()
    gate: BlendGate = field(default_factory=lambda: BlendGate(BlendConfig(), lambda: 0.0))
    """Of documents."""
    control: ControlCalls = field(default_factory=ControlCalls)
    timers: RequestTimers = field(default_factory=RequestTimers)


def make_services(
    config: ClusterConfig, cluster: Cluster, client: NodeClient, clock: Clock, process: str
) -> RequestServices:
    """Of a router by its cluster file. `process`: which of its processes it is; empty: it is one."""
    return RequestServices(
        config.router,
        cluster,
        client,
        clock,
        RequestLog(clock, process or None),
        handoff=config.handoff,
        limits=RequestLimits().waiting_for_start(config.service.start_s),
        gate=BlendGate(config.kv.blend, clock.wall),
    )
