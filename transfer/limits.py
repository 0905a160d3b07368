"""Bounds and pauses of every transport, and of the process that serves a segment for some. Whoever makes transports
passes one `TransferLimits` in."""

from dataclasses import dataclass

from transfer.nixl.limits import NixlLimits
from transfer.tcp.limits import TcpLimits
from transfer.ucx.limits import UcxLimits


@dataclass(frozen=True, slots=True)
class HostProcessLimits:
    """Of the child process that serves a segment."""

    start_s: float = 300.0
    """Page tables (0.24 s a GB) and registration, which for RDMA pins as much."""
    close_s: float = 15.0
    """More than the hosts take for closing in order."""
    first_delay_s: float = 0.1
    longest_delay_s: float = 5.0
    """Before it is started again: the first time, doubled each time after, and at most."""
    steady_s: float = 10.0
    """A process that lived so long is started again without the delay that its predecessors had earned."""
    reseal_s: float = 1.0
    """Between two looks whether the cluster's secrets are others, for which the address has to be sealed anew."""
    retire_s: float = 90.0
    """A process whose place was told under a secret that is accepted no more serves on for so long beside its
    successor: longer than read leases and reservations last."""
    report_s: float = 1.0
    """Between two looks of the process whether it has refused somebody, which it reports."""


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """Of all transports of one process."""

    tcp: TcpLimits = TcpLimits()
    ucx: UcxLimits = UcxLimits()
    nixl: NixlLimits = NixlLimits()
    host_process: HostProcessLimits = HostProcessLimits()
