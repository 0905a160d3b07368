"""Who asks: what a route may know of a request's caller, and how the caller's requests become its tenant's own."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from starlette.types import Scope

from kvcore.chunk_keys import adapted_salt, split_adapter
from kvcore.process.audit import caller
from kvcore.tenants.salts import TenantSalt
from router.requests.spec import AnswerRequest, RequestSpec

_SCOPE = "kvferry.caller"
_Begun = TypeVar("_Begun")


async def _take_nothing(_: int) -> None:
    """No limit is known."""


class Caller(msgspec.Struct, frozen=True):
    """Of one request. `salt` None: no keys are configured, and a client's salt is taken as it is."""

    tenant: str = ""
    admin: bool = True
    salt: TenantSalt | None = None
    max_share: float = 1.0
    """Of the requests that a router takes at a time: while more are under way this one is refused."""
    public_chunks: Callable[[Sequence[int]], int] = lambda _: 0
    """How many leading chunks of a prompt are shared by all tenants."""
    key_id: str = ""
    """Of the API key that it came with."""
    rank: int = 1
    """Of its priority where turns are taken, the least first."""
    first_token_s: float | None = None
    """How long a first token may take, by its tenant's limits."""
    take_tokens: Callable[[int], Awaitable[None]] = _take_nothing
    """Counts the tokens of its prompts. Raises RateLimitError where it may have no more."""
    give_back: Callable[[int], None] = lambda _: None
    """So many of them do not count."""

    async def begin(self, request: AnswerRequest, begin: Callable[[AnswerRequest], Awaitable[_Begun]]) -> _Begun:
        """What `begin` makes of the request, with KV that is nobody else's. Where it raises, which is raised, the
        request's tokens do not count. Raises RateLimitError."""
        if self.salt is None:
            return await begin(request)
        tokens = sum(len(spec.prompt_token_ids) for spec in request.specs)
        await self.take_tokens(tokens)
        try:
            return await begin(self.salted(request))
        except BaseException:
            self.give_back(tokens)
            raise

    def salted(self, request: AnswerRequest) -> AnswerRequest:
        """The request, with KV that is nobody else's; counts nothing."""
        if self.salt is None:
            return request
        salts = [self._salt(self.salt, one) for one in request.specs]
        who, share = self.tenant, self.max_share
        specs = [
            one.changed(cache_salt=salt, tenant=who, max_share=share, flow=who)
            for one, salt in zip(request.specs, salts, strict=True)
        ]
        turn = msgspec.structs.replace(request.turn, flow=who, rank=self.rank, tenant_s=self.first_token_s)
        return msgspec.structs.replace(request, specs=specs, turn=turn)

    def _salt(self, own: TenantSalt, spec: RequestSpec) -> bytes:
        adapter, salt = split_adapter(spec.cache_salt)
        return adapted_salt(adapter, own.of(salt, self.public_chunks(spec.prompt_token_ids)))

    def apart(self, cache_salt: str | None) -> str:
        """A short name of its own for each caller and salt whose prompts must not be told by how long others take. The
        salt has not been checked yet, and may be as long as a body."""
        if not cache_salt:
            return self.tenant
        return f"{self.tenant} {hashlib.sha256(cache_salt.encode('utf-8', 'surrogatepass')).hexdigest()}"

    def may_see(self, tenant: str) -> bool:
        """Whether a tenant's records are shown to it."""
        return self.admin or tenant == self.tenant


EVERYBODY = Caller()
"""Where no keys are configured."""


def caller_of(scope: Scope) -> Caller:
    """Of a request that has passed the gate, if there is one."""
    found = scope.get(_SCOPE)
    return found if isinstance(found, Caller) else EVERYBODY


def asker(scope: Scope) -> str:
    """Who gives an order, for the log: the address, and which key it was."""
    key_id, address = caller_of(scope).key_id, caller(scope.get("client"))
    return f"{address} key {key_id}" if key_id else address


def set_caller(scope: Scope, caller: Caller) -> None:
    """For the request's route to see."""
    scope[_SCOPE] = caller
