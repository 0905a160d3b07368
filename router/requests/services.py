"""What every request of a router is given."""

from dataclasses import dataclass, field

from kvcore.clock import Clock
from kvcore.config.schema import RouterConfig
from kvcore.handoff import HandoffKind
from nodeapi.protocol import NodeClient
from router.nodes.cluster import Cluster
from router.requests.control import ControlCalls
from router.requests.limits import RequestLimits
from router.requests.records import RequestLog


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
    control: ControlCalls = field(default_factory=ControlCalls)
