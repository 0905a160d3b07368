"""Where the KV of prompts lies: leading chunks in segments, by the router's index, and what follows in tiers."""

from collections.abc import Sequence

from kvcore.chunk_keys import usable_chunks
from kvcore.types import ChunkKey
from router.nodes.cluster import Cluster
from router.requests.spec import RequestSpec
from router.upkeep.nodes import KeepingNodes
from router.upkeep.prompts import UsedKv, used_kv
from router.upkeep.reports import HeldTokens, LookupReply, PromptLookup


class PromptsLookup:
    """Reads; nothing is moved for it."""

    def __init__(self, cluster: Cluster, nodes: KeepingNodes) -> None:
        self._cluster, self._nodes = cluster, nodes

    async def look(self, specs: Sequence[RequestSpec]) -> LookupReply:
        """Of the KV that the decoders use. Raises NodeUnavailableError while no engine is there."""
        kv = used_kv(self._cluster)[0]
        keys = [kv.keys(spec) for spec in specs]
        rest = list(dict.fromkeys(key for prompt in keys for key in prompt[self._cluster.index.find(prompt).longest :]))
        in_tiers, problems = await self._find(kv, rest)
        prompts = [self._line(kv, spec, prompt, in_tiers) for spec, prompt in zip(specs, keys, strict=True)]
        fingerprint = kv.fingerprints[0].hex()
        return LookupReply(
            fingerprint=fingerprint, chunk_tokens=kv.spec.chunk_tokens, prompts=prompts, problems=problems
        )

    async def _find(self, kv: UsedKv, keys: list[ChunkKey]) -> tuple[dict[tuple[str, str], set[ChunkKey]], list[str]]:
        """(tier, node, if it is that node's alone) -> which of `keys` lie there, with all of their ranks."""
        found: dict[tuple[str, str], set[ChunkKey]] = {}
        problems: list[str] = []
        if not keys:
            return found, problems
        for rank, (fingerprint, rank_keys) in enumerate(kv.by_rank(keys)):
            places, wrong = await self._nodes.order("find", fingerprint, rank_keys)
            problems += wrong
            for node, place in places:
                there = {key for key, is_there in zip(keys, place.found, strict=False) if is_there}
                where = place.name, node
                found[where] = there & found.get(where, set()) if rank else there
        return found, problems

    def _line(
        self, kv: UsedKv, spec: RequestSpec, keys: list[ChunkKey], in_tiers: dict[tuple[str, str], set[ChunkKey]]
    ) -> PromptLookup:
        step, num_tokens = kv.spec.chunk_tokens, len(spec.prompt_token_ids)
        usable = usable_chunks(num_tokens, step)  # one token is left to compute, whatever is there
        hits = self._cluster.index.find(keys[:usable])
        end = hits.longest
        while end < usable and (
            any(keys[end] in there for there in in_tiers.values()) or self._cluster.index.find([keys[end]]).longest
        ):
            end += 1
        run = keys[hits.longest : end]
        tiers = [
            HeldTokens(tier=tier, node=node, tokens=step * sum(key in there for key in run))
            for (tier, node), there in sorted(in_tiers.items())
        ]
        return PromptLookup(
            tokens=num_tokens,
            chunks=len(keys),
            memory_tokens=step * hits.longest,
            memory={node: step * chunks for node, chunks in sorted(hits.by_node.items())},
            tier_tokens=step * len(run),
            tiers=[one for one in tiers if one.tokens],
            new_tokens=num_tokens - step * end,
        )
