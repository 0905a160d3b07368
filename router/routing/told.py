"""What plain servers tell of their prefix caches: vLLM's KV events, as blocks of tokens in an index of our own.

Owns what was told, and whether it is all that there is to tell. A server that cannot be heard, or of which some event
was missed for good, counts as one that tells nothing: `router.routing.sent` guesses then. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from kvcore.chunk_keys import chunk_keys, root_key, usable_chunks
from kvcore.types import ChunkKey
from router.routing.index import KeptKeys, PrefixHits, PrefixIndex

BlockHash = int | bytes
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_FINGERPRINT = bytes(16)


class BlockStored(msgspec.Struct, frozen=True, tag=True):
    """Blocks that a server has cached, each behind the one before. Fields as vLLM names them; more are ignored."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[TokenId]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[object] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True):
    """Blocks that it has no longer."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """It has none any more."""


CacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass
class _Teller:
    """`next_seq` None: nothing was heard of it yet. `complete`: nothing was missed. `connected`: it can be heard."""

    next_seq: int | None = None
    complete: bool = False
    connected: bool = False
    block_size: int = 0
    blocks: dict[BlockHash, ChunkKey] = field(default_factory=dict)
    places: dict[ChunkKey, set[str]] = field(default_factory=dict)
    """Where each block lies: the GPU, and what the server offloads to."""

    @property
    def whole(self) -> bool:
        """Whether all that it caches is known."""
        return self.complete and self.connected


class ToldPrefixes:
    """Of `servers`, by the router's names. `max_blocks`: of one server, a few hundred bytes each; what comes beyond is
    not listed."""

    def __init__(self, servers: Sequence[str], max_blocks: int = 1 << 18) -> None:
        self._servers = {name: _Teller() for name in servers}
        self._max_blocks = max_blocks
        self._index = PrefixIndex()

    def __repr__(self) -> str:
        told = [name for name, server in self._servers.items() if server.whole]
        return f"<ToldPrefixes {len(self._index)} blocks, {len(told)} of {len(self._servers)} servers told all>"

    def is_whole(self, server: str) -> bool:
        """Whether all that this server caches is known."""
        return server in self._servers and self._servers[server].whole

    def next_seq(self, server: str) -> int | None:
        """The number of the batch that should come next; None: it is to begin anew."""
        return self._servers[server].next_seq

    def begin(self, server: str) -> None:
        """It has told nothing yet, and has nothing cached: its next batch is its first."""
        self.forget(server)
        self._servers[server].next_seq, self._servers[server].complete = 0, True

    def heard(self, server: str, connected: bool) -> None:
        """Whether it can be heard, from now on."""
        self._servers[server].connected = connected

    def missed(self, server: str) -> None:
        """Something that it told is lost."""
        self._servers[server].complete = False

    def forget(self, server: str) -> None:
        """It has started anew, or is away. Others than those that tell are ignored."""
        if server in self._servers:
            self._servers[server] = _Teller(connected=self._servers[server].connected)
            self._index.drop_node(server)

    def apply(self, server: str, seq: int, events: Sequence[CacheEvent]) -> None:
        """The batch of this number; one that is not the next one says that some were missed."""
        told = self._servers[server]
        if seq != told.next_seq:
            told.complete = False
        told.next_seq = seq + 1
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._clear(server)
            elif event.group_idx in (None, 0):  # other groups' blocks come and go beside the first one's
                if isinstance(event, BlockStored):
                    self._stored(server, told, event)
                else:
                    self._removed(server, told, event)
            told = self._servers[server]

    def find(self, prompt_token_ids: Sequence[int], salt: bytes, kept: KeptKeys) -> PrefixHits:
        """How many leading tokens of this prompt each server has that told all, the last one never. `kept`: as for
        `Cluster.hits`."""
        by_node: dict[str, int] = {}
        for size in {server.block_size for server in self._servers.values() if server.whole and server.blocks}:
            keys = kept.get((_FINGERPRINT, size))
            if keys is None:
                count = usable_chunks(len(prompt_token_ids), size)
                keys = chunk_keys(root_key(_FINGERPRINT, salt), prompt_token_ids, size)[:count]
                kept[_FINGERPRINT, size] = keys
            for name, blocks in self._index.find(keys).by_node.items():
                if self._servers[name].whole and self._servers[name].block_size == size:
                    by_node[name] = blocks * size
        return PrefixHits(max(by_node.values(), default=0), by_node, each_its_own=True)

    def _clear(self, server: str) -> None:
        """All is known of an empty cache, whatever was missed before."""
        next_seq = self._servers[server].next_seq
        self.begin(server)
        self._servers[server].next_seq = next_seq

    def _stored(self, server: str, told: _Teller, event: BlockStored) -> None:
        size = event.block_size
        if size <= 0 or size < told.block_size or len(event.token_ids) != size * len(event.block_hashes):
            return  # a part of a block, which no other prompt begins with
        if size > told.block_size:
            if told.blocks:  # they were parts
                self._index.drop_node(server)
                told.blocks, told.places = {}, {}
            told.block_size = size
        parent = _parent(told, event)
        if parent is None:
            return
        new = []
        keys = chunk_keys(parent, event.token_ids, size)
        for place, (name, key) in enumerate(zip(event.block_hashes, keys, strict=True)):
            others = event.extra_keys[place] if event.extra_keys and place < len(event.extra_keys) else None
            if (others and (place or event.parent_block_hash is not None)) or len(told.blocks) >= self._max_blocks:
                break  # it is of more than these tokens: an image
            told.blocks[name] = key
            places = told.places.setdefault(key, set())
            if not places:
                new.append(key)
            places.add(event.medium or "")
        self._index.store(server, new)

    def _removed(self, server: str, told: _Teller, event: BlockRemoved) -> None:
        gone = []
        for name in event.block_hashes:
            key = told.blocks.get(name)
            if key is None:
                continue
            places = told.places.get(key)
            if places is None:  # two names of one key, as of two salts that the events do not tell: it is gone
                del told.blocks[name]
                continue
            places.discard(event.medium or "")
            if not places:
                del told.blocks[name], told.places[key]
                gone.append(key)
        self._index.remove(server, gone)


def _parent(told: _Teller, event: BlockStored) -> ChunkKey | None:
    """What the first of these blocks continues; None: it cannot be told, or they are of an adapter."""
    if event.lora_name or event.lora_id:
        return None
    if event.parent_block_hash is not None:
        return told.blocks.get(event.parent_block_hash)
    first = event.extra_keys[0] if event.extra_keys else None
    match first:
        case None | []:
            return root_key(_FINGERPRINT, b"")
        case [str(salt)]:
            return root_key(_FINGERPRINT, salt.encode("utf-8", "surrogatepass"))
    return None
