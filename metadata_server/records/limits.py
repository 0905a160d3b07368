"""Bounds and pauses of records. What is in the cluster file is not here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RecordsLimits:
    """Values; tests pass changed ones."""

    max_key_bytes: int = 512
    max_value_bytes: int = 1 << 20
    """etcd takes 1.5 MiB in one request."""
    max_records: int = 1 << 20
    """Of an embedded kind: they are all in memory."""
    max_leases: int = 1 << 16
    max_waiting: int = 1 << 16
    """Writes that wait to be flushed."""
    gathered: int = 64
    """No write waits for more than so many to share its flush …"""
    quiet_turns: int = 32
    """… nor for longer than so many turns of the loop in which none came."""
    sweep_s: float = 30.0
    """Between two looks at which pins have ended."""
    pins_at_once: int = 1024
    """Of one call, in one flush."""
    watch_backlog: int = 4096
    """Changes that wait for a watcher; one that is further behind is given everything again."""
    pulse_s: float = 1.0
    """The task that ends leases looks at least so often …"""
    stall_s: float = 1.0
    """… and so much later than that means that this process was stopped: leases begin their time anew."""
    busy_s: float = 2.0
    """For a file that another process holds, at start: the one before us may still be ending."""
    etcd_pause_s: float = 0.1
    """After a member of etcd that did not answer, before the next is asked."""
    etcd_least_s: float = 0.1
    """For one try at one member, however little of the call's time is left."""
    etcd_page: int = 1000
    """Records of one answer."""
