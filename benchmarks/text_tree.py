"""A router's cache-aware choice over an approximate tree of what each worker was sent, as a policy of kvferry's, for
comparison. Written after SGLang's router (sgl-router/src/policies/cache_aware.rs and tree.rs, commit 026f853 of
github.com/sgl-project/sglang) with the thresholds of its command line.

Where the most loaded worker has more than `balance_abs` requests more than the least loaded one, and more than
`balance_rel` times as many, the least loaded one is taken. Else the longest prefix that the tree knows is looked up: if
that is more than `cache_threshold` of the prompt, the first worker that it lies at gets the request, else the one with
the smallest tree. Decoders are taken by the fewest requests, as its `select_worker_pair` does. The tree's nodes are
blocks of tokens here, characters of text there; it never forgets, which is in its favour.
"""

from collections import Counter
from collections.abc import Sequence

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.types import ChunkKey
from router.routing.policy import Policy, Rules, Scorer
from router.routing.scorers import SEQUENCES
from router.routing.views import NodeView, RouteRequest


class TextTree:
    """`make()` is the policy; tell it of each request that is sent (`sent`) and that has ended (`ended`)."""

    def __init__(
        self, *, block: int = 64, cache_threshold: float = 0.3, balance_abs: int = 64, balance_rel: float = 1.5
    ) -> None:
        self._block, self._threshold = block, cache_threshold
        self._abs, self._rel = balance_abs, balance_rel
        self._workers: dict[ChunkKey, dict[str, None]] = {}
        """Of each prefix that was sent: those it was sent to, in their order."""
        self._sizes = Counter[str]()
        self._loads = Counter[str]()

    def make(self) -> Policy:
        """See router.routing.policy."""
        chosen = Scorer("not chosen", self._scores)
        return Policy(decoder=Rules(((SEQUENCES, 1.0),)), prefiller=Rules(((chosen, 1.0),)))

    def sent(self, worker: str, prompt: Sequence[int]) -> None:
        """A request was sent to a worker: it is in the tree, and load of it."""
        self._loads[worker] += 1
        for key in self._keys(prompt):
            workers = self._workers.setdefault(key, {})
            if worker not in workers:
                workers[worker] = None
                self._sizes[worker] += self._block

    def ended(self, worker: str) -> None:
        """It has its whole answer."""
        self._loads[worker] -= 1

    def _scores(self, request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[float]:
        worker = self._select([node.id for node in nodes], request.prompt_token_ids)
        return [float(node.id != worker) for node in nodes]

    def _select(self, workers: Sequence[str], prompt: Sequence[int]) -> str:
        loads = [self._loads[worker] for worker in workers]
        most, least = max(loads), min(loads)
        if most - least > self._abs and most > self._rel * least:
            return workers[loads.index(least)]
        matched, at = 0, dict[str, None]()
        for key in self._keys(prompt):
            if not (found := self._workers.get(key)):
                break
            matched, at = matched + self._block, found
        here = [worker for worker in at if worker in workers]
        if here and matched > self._threshold * len(prompt):
            return here[0]
        return min(workers, key=lambda worker: self._sizes[worker])

    def _keys(self, prompt: Sequence[int]) -> list[ChunkKey]:
        return chunk_keys(root_key(bytes(16)), prompt, self._block)
