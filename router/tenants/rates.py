"""How much a tenant has asked lately, and how many wrong keys came from an address. Pure: told the time.

Invariant: over any minute a tenant gets no more than its limit and one minute's worth that it had saved up.
"""

from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from kvcore.tenants.keys import TenantLimits
from router.tenants.limits import GateLimits


class Allowance:
    """So many a second, saved up to a bound. What is known only afterwards may be taken beyond what is there, and is
    made up for before anything else is given."""

    def __init__(self, most: float, per_s: float, now: float) -> None:
        self.most, self.per_s = most, per_s
        self._left, self._at = most, now

    def __repr__(self) -> str:
        return f"<Allowance {self._left:g} of {self.most:g}>"

    def wait_s(self, amount: float, now: float) -> float:
        """How long until so much is there, or all that can be; 0: it is."""
        missing = min(amount, self.most) - self.left(now)
        return max(0.0, missing / self.per_s)

    def take(self, amount: float, now: float) -> None:
        """Whether it is there or not."""
        self._left = self.left(now) - amount
        self._at = now

    def left(self, now: float) -> float:
        """How much is there; below 0: so much was taken beyond it."""
        return min(self.most, self._left + max(0.0, now - self._at) * self.per_s)


@dataclass(slots=True)
class TenantUse:
    """One tenant's. `limits`: of now; they change with the file of keys."""

    limits: TenantLimits
    running: int = 0
    requests: Allowance | None = None
    tokens: Allowance | None = None


class TenantUses:
    """Of all tenants that asked."""

    def __init__(self, limits: GateLimits) -> None:
        self._uses: OrderedDict[str, TenantUse] = OrderedDict()
        self._max = limits.max_tenants

    def __len__(self) -> int:
        return len(self._uses)

    def __repr__(self) -> str:
        return f"<TenantUses of {len(self)} tenants, {sum(use.running for use in self._uses.values())} running>"

    def of(self, tenant: str, limits: TenantLimits, now: float) -> TenantUse:
        """With these limits from now on: an allowance whose limit is another begins anew."""
        use = self._uses.get(tenant)
        if use is None:
            use = self._uses[tenant] = TenantUse(TenantLimits())
            self._forget_idle()
        if use.limits != limits:
            use.requests = _allowance(use.requests, limits.requests_per_minute, now)
            use.tokens = _allowance(use.tokens, limits.tokens_per_minute, now)
            use.limits = limits
        self._uses.move_to_end(tenant)
        return use

    def spent(self, tenant: str, tokens: int, now: float) -> None:
        """A tenant's request has ended, with so many tokens that were not known when it began."""
        use = self._uses.get(tenant)
        if use is not None and use.tokens is not None:
            use.tokens.take(tokens, now)

    def _forget_idle(self) -> None:
        for tenant in list(self._uses)[: max(0, len(self._uses) - self._max)]:
            if not self._uses[tenant].running:
                del self._uses[tenant]


def _allowance(before: Allowance | None, per_minute: int | None, now: float) -> Allowance | None:
    if per_minute is None:
        return None
    if before is not None and before.most == per_minute:
        return before
    return Allowance(per_minute, per_minute / 60, now)


class WrongKeys:
    """By the address that they came from; of IPv6 by its network of 64 bits, which one machine has for itself."""

    def __init__(self, limits: GateLimits) -> None:
        self._limits = limits
        self._left: OrderedDict[str, Allowance] = OrderedDict()

    def __repr__(self) -> str:
        return f"<WrongKeys of {len(self._left)} addresses>"

    def wait_s(self, address: str, now: float) -> float:
        """How long no key from there is looked at; 0: it is."""
        left = self._left.get(_network(address))
        return left.wait_s(1, now) if left is not None else 0.0

    def note(self, address: str, now: float) -> None:
        """One came from there."""
        network = _network(address)
        if network not in self._left:
            self._left[network] = Allowance(self._limits.wrong_keys, 1 / self._limits.wrong_key_every_s, now)
            if len(self._left) > self._limits.max_addresses:
                self._left.popitem(last=False)
        self._left[network].take(1, now)
        self._left.move_to_end(network)


def _network(address: str) -> str:
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, IPv6Address):
        return str(found.ipv4_mapped or int(found) >> 64)
    return str(found)
