"""What a request passes before its route where the cluster has API keys: who asks, and whether that one may.

Owns no key. Invariants: without a key that holds nothing is answered but `/health`; a tenant's key reaches the routes
that are named here and no other, however its path is written; nothing of a refused request's body is read.
"""

from collections.abc import Collection
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from kvcore.clock import Clock
from kvcore.errors import AdminKeyError, InvalidRequestError, KeyRefusedError, KVFerryError, RateLimitError
from kvcore.process.proven_app import carries_proof
from kvcore.tenants.keys import KeyRecord, Priority, is_tenant_name
from kvcore.tenants.salts import TenantSalts
from kvcore.tenants.source import KeySource
from router.api.http_errors import headers_for, reply_of
from router.api.responses import JsonReply
from router.requests.records import RequestRecord
from router.tenants.callers import Caller, set_caller
from router.tenants.limits import GateLimits
from router.tenants.paths import COUNTED, OPEN, is_clients
from router.tenants.public import PublicPrefixes
from router.tenants.rates import TenantUse, WrongKeys
from router.tenants.shared_use import SharedUse, TenantTotals
from router.tenants.sides import is_certified, is_operators

_RANKS: dict[Priority, int] = {"high": 0, "normal": 1, "low": 2}
_ONE_REQUEST = TenantTotals(running=1, requests=1)
FOR_TENANT = b"x-kvferry-tenant"
"""An admin's request with this header is of that tenant's KV."""


class TenantGate:
    """`app` gets what may pass. `proved`: what answers all that are said to come from a process of the cluster, and
    checks their proof; None: there are none. Whose a request is is said by its key, and without one by its proof or
    certificate. `apart`: operators have a listener of their own, and on the other one everybody is a tenant. `shared`:
    with the other routers; None: this is the only one."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeySource,
        salts: TenantSalts,
        clock: Clock,
        *,
        shared: SharedUse | None = None,
        proved: ASGIApp | None = None,
        apart: bool = False,
        gateways: Collection[str] = (),
        public: PublicPrefixes | None = None,
        limits: GateLimits = GateLimits(),
    ) -> None:
        self._app, self._proved, self._apart = app, proved, apart
        self._keys, self._salts, self._clock, self._limits = keys, salts, clock, limits
        self._gateways, self._public = frozenset(gateways), public or PublicPrefixes()
        self._shared = shared or SharedUse(keys, clock, limits)
        self._uses, self._wrong = self._shared.uses, WrongKeys(limits)
        self._shares: dict[Priority, float] = {
            "low": limits.low_share,
            "normal": limits.normal_share,
            "high": 1.0,
        }

    def __repr__(self) -> str:
        return f"<TenantGate {self._keys!r}, {self._uses!r}, {self._wrong!r}>"

    def ended(self, record: RequestRecord) -> None:
        """A request has ended: its completion counts for its tenant."""
        if record.tenant:
            self._uses.spent(record.tenant, record.completion_tokens, self._clock.now())
            self._shared.took(record.tenant, tokens=record.completion_tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or (scope["path"] in OPEN and scope["method"] in ("GET", "POST")):
            await self._app(scope, receive, send)
            return
        app, admitted, key = self._app, None, _key_in(scope)
        try:
            operators = is_operators(scope) or not self._apart
            if self._proved is not None and operators and carries_proof(scope):
                app = self._proved
            if key is None and (app is self._proved or is_certified(scope)):
                set_caller(scope, self._operator(scope))
            else:
                admitted = await self._admit(scope, self._check_key(scope, key))
        except KVFerryError as error:
            headers = {**headers_for(error), "Connection": "close"}  # its body is not read
            await JsonReply(reply_of(error), error.http_status, headers)(scope, receive, send)
            return
        if admitted is None:
            await app(scope, receive, send)
            return
        tenant, use = admitted
        use.running += 1
        self._shared.took(tenant, running=1, requests=1)
        try:
            await app(scope, receive, send)
        finally:
            use.running -= 1
            self._shared.took(tenant, running=-1)

    def _check_key(self, scope: Scope, key: str | None) -> KeyRecord:
        """Raises KeyRefusedError, RateLimitError, AdminKeyError."""
        address, now = self._address(scope), self._clock.now()
        if wait_s := self._wrong.wait_s(address, now):
            raise RateLimitError(f"too many wrong API keys came from {address}", retry_after_s=wait_s)
        record = self._keys.ring.find(key) if key is not None else None
        if record is None:
            if key is not None:
                self._wrong.note(address, now)
            none = "no API key was given: send `Authorization: Bearer KEY`"
            raise KeyRefusedError(none if key is None else "this API key does not hold")
        if not record.admin and not is_clients(scope["path"], records=True):
            raise AdminKeyError(f"{scope['method']} {scope['path']}: this needs an admin's API key")
        return record

    async def _admit(self, scope: Scope, record: KeyRecord) -> tuple[str, TenantUse] | None:
        """Sets the request's caller. Whose it is and by what it is counted; None: it is not. Raises RateLimitError."""
        admin = record.admin and (is_operators(scope) or not self._apart)
        tenant = (_for_tenant(scope) if admin else "") or record.tenant
        ring, now = self._keys.ring, self._clock.now()
        limits = ring.limits(tenant)
        use = self._uses.of(tenant, limits, now)
        share = self._shares[limits.priority]
        take = partial(self._take_tokens, tenant, use)
        public = self._public.num_chunks
        set_caller(
            scope,
            Caller(
                tenant,
                admin,
                self._salts(tenant),
                share,
                public,
                record.id,
                rank=_RANKS[limits.priority],
                first_token_s=limits.first_token_s,
                take_tokens=take,
                give_back=partial(self._give_back, tenant, use),
            ),
        )
        if scope["path"] not in COUNTED:
            return None
        await self._shared.before(tenant, _ONE_REQUEST)
        now = self._clock.now()
        running = use.running + self._shared.running_elsewhere(tenant)
        if limits.concurrency is not None and running >= limits.concurrency:
            text = f"tenant {tenant} has {running} requests under way, as many as it may have"
            raise RateLimitError(text, retry_after_s=1)
        if use.requests is not None:
            if wait_s := use.requests.wait_s(1, now):
                text = f"tenant {tenant} may send {limits.requests_per_minute} requests a minute"
                raise RateLimitError(text, retry_after_s=wait_s)
            use.requests.take(1, now)
        return tenant, use

    async def _take_tokens(self, tenant: str, use: TenantUse, tokens: int) -> None:
        await self._shared.before(tenant, TenantTotals(tokens=tokens))
        now = self._clock.now()
        if use.tokens is None:
            return
        if wait_s := use.tokens.wait_s(tokens, now):
            text = f"tenant {tenant} may use {use.limits.tokens_per_minute} tokens a minute; the prompt has {tokens}"
            raise RateLimitError(text, retry_after_s=wait_s, kind="tokens")
        use.tokens.take(tokens, now)
        self._shared.took(tenant, tokens=tokens)

    def _give_back(self, tenant: str, use: TenantUse, tokens: int) -> None:
        if use.tokens is not None:
            use.tokens.take(-tokens, self._clock.now())
            self._shared.took(tenant, tokens=-tokens)

    def _operator(self, scope: Scope) -> Caller:
        """Who proves to be of the cluster. `FOR_TENANT` names a tenant of which it asks."""
        tenant = _for_tenant(scope)
        return Caller(tenant, salt=self._salts(tenant), public_chunks=self._public.num_chunks) if tenant else Caller()

    def _address(self, scope: Scope) -> str:
        client = scope.get("client")
        address: str = client[0] if client else "unknown"
        if address in self._gateways:
            given = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
            last = given[-1].decode("latin-1").rpartition(",")[2].strip() if given else ""
            return last[:64] or address
        return address


def _key_in(scope: Scope) -> str | None:
    """None: there is none. Of several none counts: whose request would it be?"""
    found = []
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            found.append(key.strip() if scheme.lower() == "bearer" else "")
        elif name == b"x-api-key":
            found.append(value.decode("latin-1").strip())
    if not found:
        return None
    return found[0] if len(set(found)) == 1 else ""


def _for_tenant(scope: Scope) -> str:
    """Empty: it is not said. Raises InvalidRequestError."""
    name = next((value.decode("latin-1") for name, value in scope["headers"] if name == FOR_TENANT), "")
    if name and not is_tenant_name(name):
        raise InvalidRequestError("X-KVFerry-Tenant is no name of a tenant")
    return name
