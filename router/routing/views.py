"""What a policy sees: the request, the usable nodes at one moment, and why the others are not. Values only."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import msgspec

from kvcore.types import KVSpec, Role
from nodeapi.adapters import ServedAdapter
from nodeapi.messages import TierReport
from router.documents.hits import NO_DOCUMENTS, DocumentHits
from router.routing.index import PrefixHits
from router.routing.limits import RateLimits
from router.routing.rates import Doubt, PairRate, RateKind

NO_HITS = PrefixHits()
LEFT_SHARE = 0.1
"""Of a prompt that should be done by now and is not."""


class ToldWork(NamedTuple):
    """What other routers said at `at` that a node has to do for them. `prefill_tokens`: until it is done with them, so
    many are to be computed, whosesoever they are."""

    sequences: int = 0
    prefill_tokens: float = 0.0
    at: float = 0.0

    def left_tokens(self, prefill_rate: float, now: float) -> float:
        """To compute, as far as time tells."""
        return max(0.0, self.prefill_tokens - prefill_rate * (now - self.at))


class TierRates(NamedTuple):
    """The tiers that a node loads from, its own `disk` and the fastest of those that all nodes share, by name, empty
    where it has none; bytes a second, 0: not known."""

    disk: str = ""
    disk_rate: float = 0.0
    shared: str = ""
    shared_rate: float = 0.0

    @classmethod
    def of(cls, reports: Sequence[TierReport]) -> "TierRates":
        """As the node says. One with which something is wrong counts for nothing."""
        well = [tier for tier in reports if not tier.problem]
        disk = next((tier for tier in well if not tier.shared), None)
        shared = max((tier for tier in well if tier.shared), key=lambda tier: tier.load_rate or 0.0, default=None)
        return cls(
            disk.name if disk else "",
            (disk.load_rate or 0.0) if disk else 0.0,
            shared.name if shared else "",
            (shared.load_rate or 0.0) if shared else 0.0,
        )


NO_TIERS = TierRates()


class NodeView(msgspec.Struct, frozen=True):
    """A node that may be used now. `sequences` and `prefill_tokens` are outstanding work; `kv_spec` explains, the
    fingerprint decides."""

    id: str
    role: Role
    fingerprint: bytes
    chunk_tokens: int
    max_context: int
    sequences: int = 0
    prefill_tokens: int = 0
    kv_spec: KVSpec | None = None
    doubtful: bool = False
    """It was slow or silent of late: whoever is not is preferred."""
    lacks: frozenset[str] = frozenset()
    """Fields of SamplingParams that it cannot be sent."""
    adapters: frozenset[ServedAdapter] = frozenset()
    """That it serves."""
    prefills: int = 0
    """Prompts that `prefill_tokens` are of."""
    computing_since: float = 0.0
    """Since when it has been at the first of them, by the router's clock."""
    max_sequences: int = 0
    """That it decodes at a time; 0: not known. So with the next ones, which are measured (`router.routing.rates`)."""
    prefill_rate: float = 0.0
    is_warm_up: bool = False
    """That rate is of one prompt alone, the node's first: often it is many times too slow."""
    step_s: float = 0.0
    stay_s: float = 0.0
    near_rate: float = 0.0
    """Bytes of KV a second that it reads, out of memory of its own machine, …"""
    far_rate: float = 0.0
    """… and of others, …"""
    read_rates: Mapping[str, PairRate] = {}
    """… of each machine."""
    machine: str = ""
    """Where its memory lies; empty: not known."""
    put_rates: Mapping[str, PairRate] = {}
    """Bytes of KV a second that it writes, by machine."""
    doubts: Mapping[tuple[RateKind, str], Doubt] = {}
    """What may be doubted of these rates; the machine is that of `put`, or empty."""

    takes_documents: bool = False
    told: ToldWork | None = None
    """By the other routers; their sequences are part of `sequences`."""
    tiers: TierRates = NO_TIERS

    @property
    def load(self) -> int:
        """By which nodes of its role are in order: sequences of a decoder, tokens of a prefiller; 0 only if it has
        nothing to do."""
        if self.role is Role.DECODER:
            return self.sequences
        return self.prefill_tokens or int(self.told is not None and self.told.prefill_tokens > 0)

    def read_rate(self, machine: str, now: float, limits: RateLimits = RateLimits()) -> float:
        """Out of the memory of a machine, as far as that is known. Empty: of some other."""
        if machine and machine == self.machine:
            return self.near_rate
        pair = self.read_rates.get(machine)
        return pair.per_s if pair is not None and now - pair.at < limits.pair_s else self.far_rate

    def put_rate(self, machine: str, now: float, limits: RateLimits = RateLimits()) -> float:
        """Into the memory of another machine; 0: not known, not any more, or its own."""
        pair = self.put_rates.get(machine) if machine != self.machine else None
        return pair.per_s if pair is not None and now - pair.at < limits.pair_s else 0.0

    def ahead_tokens(self, now: float) -> float:
        """To compute before it begins with what it is given now."""
        own = self.prefill_tokens if self.prefills != 1 else self.left_tokens(now)
        return own if self.told is None else max(own, self.told.left_tokens(self.prefill_rate, now))

    def left_tokens(self, now: float) -> float:
        """Of its one prompt, as far as time tells. Never none, as it may hang: one that has nothing to do is better."""
        done = self.prefill_rate * (now - self.computing_since)
        return max(LEFT_SHARE * self.prefill_tokens, self.prefill_tokens - done)


class NodeKind(NamedTuple):
    """What filters ask of a node that many nodes have in common. See NodeView."""

    fingerprint: bytes
    max_context: int
    doubtful: bool
    lacks: frozenset[str] = frozenset()
    adapters: frozenset[ServedAdapter] = frozenset()
    takes_documents: bool = False

    @classmethod
    def of(cls, node: NodeView) -> "NodeKind":
        """This one's."""
        return cls._make(_kind_of(node))


_kind_of: Callable[[NodeView], tuple[object, ...]] = attrgetter(*NodeKind._fields)


def same_kind(one: NodeView, other: NodeView) -> bool:
    """Whether filters see no difference between them: both have the same NodeKind, of which none need be made."""
    return _kind_of(one) == _kind_of(other)


class NodeViews(tuple[NodeView, ...]):
    """Nodes of which is known what kinds are among them and who has least to do: with a thousand nobody need look at
    each."""

    kinds: Collection[NodeKind]
    by_load: Sequence[tuple[int, int, NodeView]] = ()
    """(load, a number of its own, node), in this order."""
    places: Mapping[str, int] = {}
    """Of each node, by its name, among these."""

    @classmethod
    def made(
        cls,
        nodes: Iterable[NodeView],
        kinds: Collection[NodeKind],
        by_load: Sequence[tuple[int, int, NodeView]],
        places: Mapping[str, int],
    ) -> "NodeViews":
        """Of these nodes."""
        made = cls(nodes)
        made.kinds, made.by_load, made.places = kinds, by_load, places
        return made


def one_of_each_kv(nodes: Sequence[NodeView]) -> Iterable[NodeView]:
    """A node for each kind of KV among them."""
    if isinstance(nodes, NodeViews) and len(nodes.kinds) == 1:
        return nodes[:1]
    found: dict[bytes, NodeView] = {}
    for node in nodes:
        found.setdefault(node.fingerprint, node)
    return found.values()


def serves(node: NodeView | NodeKind, adapter: str) -> bool:
    """Whether it serves the adapter of this identity; empty: the model alone."""
    return not adapter or any(one.identity == adapter for one in node.adapters)


class LeftOut(msgspec.Struct, frozen=True):
    """A node that was not considered, and why, in words for people."""

    node: str
    role: Role
    reason: str


class ClusterView(msgspec.Struct, frozen=True):
    """The usable nodes at one moment, in a stable order, and the nodes with an engine that cannot be used."""

    prefillers: tuple[NodeView, ...] = ()
    decoders: tuple[NodeView, ...] = ()
    unusable: tuple[LeftOut, ...] = ()


class RouteRequest(msgspec.Struct, frozen=True):
    """What a choice depends on. `hits[fingerprint]`: where the prompt's chunks are, if anywhere. `turn` counts
    requests: it breaks ties and is round robin's memory. `decoder`: already chosen, only a prefiller is wanted.
    `fingerprint`: of the KV of the answer that is to go on; empty: none has begun. `full`: those of `exclude` that only
    have no room. `session`: what the client names its requests by that belong together; empty: nothing. `now`: by the
    router's clock. `asks`: fields of SamplingParams that its decoder must not lack."""

    prompt_tokens: int
    min_prefill_tokens: int
    completion_tokens: int = 1
    turn: int = 0
    hits: Mapping[bytes, PrefixHits] = {}
    exclude: frozenset[str] = frozenset()
    decoder: str | None = None
    fingerprint: bytes = b""
    full: frozenset[str] = frozenset()
    prompt_token_ids: Sequence[int] = ()
    session: str = ""
    now: float = 0.0
    asks: frozenset[str] = frozenset()
    adapter: str = ""
    """The identity of the one that its nodes must serve; empty: the model alone."""
    weighs: bool = True
    """What both ways take decides between them; False: a decoder computes only when it is needed."""
    whole_prompt: bool = False
    """Its decoder computes all of it, whatever is cached: logprobs of its tokens are wanted, which KV does not have."""
    documents: Mapping[bytes, DocumentHits] = {}
    """As `hits`, of the kinds of KV of which nodes take documents; empty: the prompt has none that are reused."""
    compute_rate: float = 0.0
    """Of the fastest node that could compute the prompt for a decoder, …"""
    peer_rate: float = 0.0
    """… and of the fastest disk that holds some of it, in bytes; 0: not known, or nothing lies in a tier."""

    @property
    def is_plain(self) -> bool:
        """Whether it asks for nothing in particular, and is tried for the first time: as most are."""
        asks = self.adapter or self.asks or self.documents or self.fingerprint
        return not (asks or self.exclude or self.decoder)

    def documents_for(self, node: NodeView) -> DocumentHits:
        """Where the prompt's documents are, if this node takes them."""
        return self.documents.get(node.fingerprint, NO_DOCUMENTS) if node.takes_documents else NO_DOCUMENTS

    def hits_for(self, node: NodeView) -> PrefixHits:
        """Where the prompt's chunks of this node's kind of KV are."""
        return self.hits.get(node.fingerprint, NO_HITS)
