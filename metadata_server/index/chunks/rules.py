"""When segments evict, and what tenants may have of them. Values."""

from dataclasses import dataclass

from kvcore.eviction.quotas import TenantLimit


@dataclass(frozen=True, slots=True)
class RoomRules:
    """When a segment evicts."""

    high: float = 1.0
    """What would bring its use over this share evicts …"""
    low: float = 1.0
    """… down to this one, …"""
    most_evicted: int = 256
    """… but no more chunks than that beyond what is needed: nobody waits for thousands to go."""
    tenants: TenantLimit | None = None
    """What each may have."""
