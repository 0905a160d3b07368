"""How a call is split among partitions: what each is asked, and whose items those were. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from kvcore.partitions import Partitions
from metadata_server.cache_messages import MoveChunksRequest, RebalanceRequest, ReleaseRequest, RenewRequest
from metadata_server.messages import (
    MatchRequest,
    QuarantineRequest,
    ReplicaIds,
    ReserveRequest,
    TellHoldingsRequest,
)
from metadata_server.partitions.numbers import unpacked

_R = TypeVar("_R")
_replace = msgspec.structs.replace


@dataclass(frozen=True, slots=True)
class Piece(Generic[_R]):
    """What one partition is asked. `at`: where its items stand in the caller's request."""

    number: int
    request: _R
    at: Sequence[int] = ()


def to_all(request: _R, whole: Partitions) -> list[Piece[_R]]:
    """The same to each."""
    return [Piece(number, request) for number in range(len(whole.names))]


def by_keys(request: Any, whole: Partitions) -> list[Piece[Any]]:
    """Of a request with `keys`."""
    places = _places(whole.numbers_of(request.keys))
    return [
        Piece(number, _replace(request, keys=[request.keys[at] for at in places[number]]), places[number])
        for number in places
    ]


def by_prefix(request: MatchRequest, whole: Partitions) -> list[Piece[MatchRequest]]:
    """As `by_keys`; a lookup that is a long poll is one no more: each partition says what it has now."""
    asked = MatchRequest(**{name: getattr(request, name) for name in MatchRequest.__struct_fields__})
    return by_keys(asked, whole)


def by_items(request: ReserveRequest, whole: Partitions) -> list[Piece[ReserveRequest]]:
    """Those of each partition stay in the order of their prompt: each continues the nearest one before it there."""
    places = _places(whole.numbers_of(item.key for item in request.items))
    return [
        Piece(number, _replace(request, items=[request.items[at] for at in places[number]]), places[number])
        for number in places
    ]


def by_replica_ids(request: ReplicaIds, whole: Partitions) -> list[Piece[ReplicaIds]]:
    """An id says whose it is."""
    count = len(whole.names)
    places = _places(replica_id % count for replica_id in request.replica_ids)
    return [
        Piece(number, _replace(request, replica_ids=[request.replica_ids[at] for at in places[number]]), places[number])
        for number in places
    ]


def by_replicas(request: QuarantineRequest, whole: Partitions) -> list[Piece[QuarantineRequest]]:
    """Their keys say whose they are."""
    places = _places(whole.numbers_of(item.replica.key for item in request.items))
    return [
        Piece(number, _replace(request, items=[request.items[at] for at in places[number]]), places[number])
        for number in places
    ]


def by_leases(request: RenewRequest, whole: Partitions) -> list[Piece[RenewRequest]]:
    """Each number may stand for leases of several partitions. `at`: of each id, the number it came from."""
    ids, places = _lease_ids(request.lease_ids, len(whole.names))
    return [Piece(number, _replace(request, lease_ids=ids[number]), places[number]) for number in ids]


def by_leases_and_names(request: ReleaseRequest, whole: Partitions) -> list[Piece[ReleaseRequest]]:
    """A name is of leases in any partition."""
    ids, _ = _lease_ids(request.lease_ids, len(whole.names))
    numbers = range(len(whole.names)) if request.lease_names else ids
    return [Piece(number, _replace(request, lease_ids=ids.get(number, []))) for number in numbers]


def by_holdings(request: TellHoldingsRequest, whole: Partitions) -> list[Piece[TellHoldingsRequest]]:
    """All are told, also of nothing: a partition that has forgotten the node says so."""
    added, removed = (_split(whole, keys) for keys in (request.added, request.removed))
    return [
        Piece(number, _replace(request, added=added.get(number, []), removed=removed.get(number, [])))
        for number in range(len(whole.names))
    ]


def by_moves(request: MoveChunksRequest, whole: Partitions) -> list[Piece[MoveChunksRequest]]:
    """Each chooses among its own chunks, of its part of the bytes."""
    copied, most = _split(whole, request.copied), max(1, request.most_bytes // len(whole.names))
    return [
        Piece(number, _replace(request, copied=copied.get(number, []), most_bytes=most))
        for number in range(len(whole.names))
    ]


def by_share(request: RebalanceRequest, whole: Partitions) -> list[Piece[RebalanceRequest]]:
    """Each moves its part of the bytes at most."""
    most = max(1, request.most_bytes // len(whole.names)) if request.most_bytes else 0
    return [Piece(number, _replace(request, most_bytes=most)) for number in range(len(whole.names))]


Splitter = Callable[[Any, Partitions], list[Piece[Any]]]


def _places(numbers: Iterable[int]) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for at, number in enumerate(numbers):
        places.setdefault(number, []).append(at)
    return places


def _split(whole: Partitions, keys: Sequence[Any]) -> Mapping[int, list[Any]]:
    return {number: [keys[at] for at in there] for number, there in _places(whole.numbers_of(keys)).items()}


def _lease_ids(numbers: Sequence[int], count: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """By partition: ids, and for each the place of the number that it came from."""
    ids: dict[int, list[int]] = {}
    places: dict[int, list[int]] = {}
    for at, number in enumerate(numbers):
        for lease_id in unpacked(number):
            ids.setdefault(lease_id % count, []).append(lease_id)
            places.setdefault(lease_id % count, []).append(at)
    return ids, places
