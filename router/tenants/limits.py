"""Bounds of what is checked before a request, in one struct that tests may change. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GateLimits:
    """Of wrong keys, and of what is remembered."""

    wrong_keys: int = 10
    """Of one address in a row; then no key is looked at that comes from there, until …"""
    wrong_key_every_s: float = 6.0
    """… one more is forgiven each so many seconds."""
    max_addresses: int = 10_000
    """Of which wrong keys are remembered; that with the oldest is forgotten."""
    max_tenants: int = 10_000
    """Of which rates are remembered."""
    reload_s: float = 1.0
    """Pause between two looks at the file of keys."""
    tell_s: float = 0.25
    """Pause between two times that another router is told what tenants have used here."""
    retry_s: float = 0.05
    """The same where it was not reached: until two routers know each other each counts its own alone."""
    tell_timeout_s: float = 2.0
    ask_every_s: float = 0.01
    """Pause between two times that it is asked what it gave: one question is of all tenants that wait for it."""
    ask_s: float = 0.25
    """A router that says nothing for so long is not waited for, until it has spoken again."""
    max_asks: int = 20
    """Of one request; then it goes by what is known."""
    slack: float = 0.01
    """Of a tenant's limit: so much the routers together may give without asking."""
    use_lasts_s: float = 3.0
    """What another router said of requests under way counts for so long."""
    max_routers: int = 64
    """Of which it is known what tenants use there."""
    max_report_bytes: int = 4 << 20
    low_share: float = 0.5
    """Tenants of priority low get no more requests in while so much of `router.max_requests` is under way, …"""
    normal_share: float = 0.9
    """… and those of priority normal. High: all."""
