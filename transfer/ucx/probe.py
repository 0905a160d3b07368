"""What UCX would do for a configuration on this machine: opens a context, looks, closes it. For `kvferry doctor`."""

from dataclasses import dataclass

from kvcore.config.schema import TransportConfig
from transfer.ucx.binding import load_library, open_context
from transfer.ucx.devices import check_opened, plan_devices, read_components, read_resources

_RMA = 1 << 1


@dataclass(frozen=True, slots=True)
class UcxProbe:
    """`components` are what the build has (`ib`: verbs and mlx5), `resources` (`rc_mlx5/mlx5_0:1`) what it will use."""

    build: str
    components: tuple[str, ...]
    resources: tuple[str, ...]
    rdma: bool


def probe_ucx(config: TransportConfig) -> UcxProbe:
    """Raises ConfigError naming the library, device or transport that is missing. Leaves the library loaded."""
    plan = plan_devices(config.devices)
    library = load_library(config.ucx_library)
    context = open_context(library, plan.options(), _RMA)
    try:
        text = library.printed("ucp_context_print_info", context)
    finally:
        library.lib.ucp_cleanup(context)
    resources = read_resources(text)
    check_opened(plan, resources, library.build)
    return UcxProbe(library.build, read_components(text), resources, plan.rdma)
