"""How long the parts of the connector wait, and how much they remember. One value for all of an engine's halves."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConnectorLimits:
    """Times in seconds. A worker half runs on vLLM's worker thread: what it waits for there holds the whole engine."""

    lookup_start_s: float = 10.0
    lookup_close_s: float = 3.0
    first_wait_s: float = 0.002
    """vLLM's scheduler waits that long for a lookup's answer: once a request at most, and once a step."""
    follow_s: float = 5.0
    """A request waits no longer than this, in all, for loads of others that begin as it does."""

    worker_start_s: float = 60.0
    """Opening transports takes milliseconds; pinning an engine's KV memory for RDMA seconds."""
    write_ends_s: float = 5.0
    """A preempted request's writes under way have this long before they are cancelled."""
    preemption_s: float = 10.0
    """A preemption waits no longer than this for its jobs; then nothing more of its request is committed."""
    idle_s: float = 0.005
    """Pause of an idle step. A new request waits for the end of that step; a load that ends does not."""
    saves_end_s: float = 3.0
    """At the end of a worker half, for the saves under way."""
    worker_close_s: float = 15.0
    remembered_handoffs: int = 4096
    """Legs whose handoff has ended, as the word of it may come before the leg's load."""

    bus_connect_s: float = 5.0
    bus_first_pause_s: float = 0.05
    """Before the bus is tried again; doubled each time, up to the longest."""
    bus_longest_pause_s: float = 2.0

    device_copy_s: float = 60.0
    """One batch's copies take milliseconds; a device that takes this long is lost."""
    staging_slots: int = 8
    """Chunks on their way between a GPU and the store at once; each has pinned memory of its own."""
