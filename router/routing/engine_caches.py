"""Where a prompt's KV is: in the nodes' memory, as the index says, and in their engines' own blocks, which none tells.

Owns no index and no guess of its own: it asks `index`, and `held` beside it or, of servers that are not
ours, `sent` alone. What lies in tiers `tiers` says.
"""

from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from kvcore.chunk_keys import prompt_keys, usable_chunks
from kvcore.types import ChunkKey
from nodeapi.documents import Documents
from nodeapi.messages import EngineInfo
from router.documents.hits import DocumentHits, document_hits
from router.routing.held import HeldPrefixes
from router.routing.index import KeptKeys, PrefixHits, PrefixIndex
from router.routing.parted_index import PartedIndex
from router.routing.sent import SentPrefixes
from router.routing.tier_index import TierIndex
from router.routing.told import ToldPrefixes
from router.routing.views import NO_HITS, ClusterView, one_of_each_kv


class EngineCaches:
    """`has_store`: nodes tell what lies in their memory. `telling`: plain servers that tell of their own caches."""

    def __init__(
        self,
        index: PrefixIndex | PartedIndex,
        tiers: TierIndex,
        machine_of: Callable[[str], str] = lambda _node: "",
        *,
        has_store: bool,
        telling: Sequence[str] = (),
        soon_blocks: int = 4096,
    ) -> None:
        """`machine_of`: where a node's memory lies, by its name. `soon_blocks`: of what a server that tells was sent
        last: it is about to have it, and has not told yet."""
        self._index, self._tiers, self._machine_of = index, tiers, machine_of
        self.told = ToldPrefixes(telling) if telling else None
        self._soon = SentPrefixes(max_blocks=soon_blocks) if telling else None
        self._held, self._sent = HeldPrefixes(), None if has_store else SentPrefixes()

    def __repr__(self) -> str:
        return f"<EngineCaches {self._held if self._sent is None else self._sent}>"

    def forget(self, node_id: str) -> None:
        """Its engine has started anew, or is away."""
        self._held.forget(node_id)
        if self._sent is not None:
            self._sent.forget(node_id)
        if self.told is not None and self._soon is not None:
            self.told.forget(node_id)
            self._soon.forget(node_id)

    def held_chunks(self, node_id: str) -> int:
        """That its engine is taken to have read out of other nodes' memory, with what follows them."""
        return self._held.count(node_id)

    def chosen(self, node_id: str, prompt_token_ids: Sequence[int], salt: bytes) -> None:
        """The node is to compute this prompt, or to be handed it over. A plain server is taken to have its KV from here
        on: by the time that it gets to another one that begins alike, it has."""
        if self._sent is not None:
            self._sent.sent(node_id, prompt_token_ids, salt)
        if self._soon is not None:
            self._soon.sent(node_id, prompt_token_ids, salt)

    def computed(self, node_id: str, engine: EngineInfo, fingerprint: bytes, kept: KeptKeys) -> None:
        """The node's engine has the KV of the prompt with these keys in its own blocks now. `fingerprint`: of that."""
        keys = kept.get((fingerprint, engine.kv_spec.chunk_tokens)) if self._sent is None else None
        if keys and self._index.find(keys).by_node.get(node_id, 0) < len(keys):
            self._held.read(node_id, engine, keys)

    def not_promoted(self, kept: KeptKeys) -> None:
        """A node looked for a prompt's chunks in its tiers, and there was none."""
        for keys in kept.values():
            self._tiers.missed(keys)

    def hits(
        self, view: ClusterView, prompt_token_ids: Sequence[int], salt: bytes, kept: KeptKeys
    ) -> dict[bytes, PrefixHits]:
        """See `Cluster.hits`. What is nowhere has none."""
        found: dict[bytes, PrefixHits] = {}
        if self._sent is not None:
            hits = self._plain_hits(self._sent.find(prompt_token_ids, salt, kept), prompt_token_ids, salt, kept)
            return {node.fingerprint: hits for node in (view.decoders or view.prefillers)[:1]}
        if not (self._index or self._tiers):
            return found
        for node in one_of_each_kv(view.decoders or view.prefillers):
            keys = kept.get(kind := (node.fingerprint, node.chunk_tokens))
            if keys is None:
                count = usable_chunks(len(prompt_token_ids), node.chunk_tokens)
                keys = kept[kind] = prompt_keys(node.fingerprint, salt, prompt_token_ids, node.chunk_tokens)[:count]
            in_memory = self._placed(self._index.find(keys))
            hits = self._tiers.behind(self._held.with_these(in_memory, keys), keys)
            if hits.longest or hits.in_tiers:
                found[node.fingerprint] = hits
        return found

    def document_hits(
        self,
        view: ClusterView,
        told: Documents,
        keys_of: Callable[[bytes, int], Sequence[Sequence[ChunkKey]]],
        hits: Mapping[bytes, PrefixHits],
    ) -> dict[bytes, DocumentHits]:
        """Where documents are, for each kind of KV of those who may decode and take them. `keys_of`: of each, by
        fingerprint and size of chunks. `hits`: of their prompt, as those go first."""
        found: dict[bytes, DocumentHits] = {}
        for node in (view.decoders or view.prefillers) if self._sent is None else ():
            if node.takes_documents and node.fingerprint not in found:
                size, prefix = node.chunk_tokens, hits.get(node.fingerprint, NO_HITS)
                found[node.fingerprint] = document_hits(
                    told,
                    keys_of(node.fingerprint, size),
                    lambda keys: self._tiers.behind(self._index.find(keys), keys),
                    cached_tokens=(prefix.longest + prefix.in_tiers) * size,
                    chunk_tokens=size,
                )
        return found

    def _placed(self, found: PrefixHits) -> PrefixHits:
        if not found.by_node:
            return found
        most = max(found.by_node.values())
        machines = {self._machine_of(name) for name, count in found.by_node.items() if count == most}
        return replace(found, machine=machines.pop()) if len(machines) == 1 else found

    def _plain_hits(
        self, guessed: PrefixHits, prompt_token_ids: Sequence[int], salt: bytes, kept: KeptKeys
    ) -> PrefixHits:
        """What servers have that told all, and what they are about to have; what is guessed of the others."""
        if self.told is None or self._soon is None:
            return guessed
        told, soon = self.told.find(prompt_token_ids, salt, kept), self._soon.find(prompt_token_ids, salt, kept)
        by_node = {name: count for name, count in guessed.by_node.items() if not self.told.is_whole(name)}
        for name in [*told.by_node, *soon.by_node]:
            if self.told.is_whole(name):
                by_node[name] = max(told.by_node.get(name, 0), soon.by_node.get(name, 0))
        return PrefixHits(max(by_node.values(), default=0), by_node, each_its_own=True, full=guessed.full)
